"""What the tutorial of SLURM tells a reader to type, typed on the private cluster."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks_of, run, smaller, times_printed
from slurm_runs import Slurm, losses

pytest_plugins = ["slurm_lab"]
pytestmark = pytest.mark.timeout(1200)
# What this cluster cannot do as printed, and what is done instead.
HERE = {
    "hydra.launcher.gpus_per_node=8": "hydra.launcher.tasks_per_node=1",
    "python -m job.prepare": "python -m job.prepare --max-samples 500",
}


def test_the_tutorial_can_be_followed(slurm: Slurm, tmp_path: Path) -> None:
    page = ROOT / "docs" / "tutorials" / "sweep-on-slurm.md"
    blocks = [block for block in blocks_of(page) if block.suite == "slurm"]
    assert [times_printed(blocks, printed) for printed in HERE] == [2, 1]
    weights = [tmp_path / "runs" / "weights" / f"loss.cycle_text_weight={weight}" for weight in ("0.05", "0.1", "0.2")]
    runs = [tmp_path / "runs" / "first", *weights]
    try:
        first, _, _, _, compared = [run(smaller(block, HERE), tmp_path, slurm.cluster.env) for block in blocks]
    finally:
        files = [path / "slurm" / "submission.json" for path in runs]
        slurm.jobs.extend(json.loads(file.read_text())["job"] for file in files if file.exists())
    assert [max(losses(path)) for path in runs] == [20, 20, 20, 20]
    assert re.search(r"^ *0: finished: .*runs/first$", first, re.M), "logs -f stays to the end"
    assert re.search(r"^ *0: finished: .*=0\.1$", compared, re.M)
    assert all(weight in compared for weight in ("0.05", "0.1", "0.2"))
    assert (tmp_path / "compare.html").stat().st_size > 1000

"""What the tutorial of SLURM tells a reader to type, typed on the private cluster."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from doc_blocks import ROOT, Block, blocks_of, run
from slurm_runs import Slurm, losses

pytest_plugins = ["slurm_lab"]
pytestmark = pytest.mark.timeout(1200)
# The cluster has no GPU and few cores, and a test has no time for a demo: all else is as printed.
FEWER_RANKS = {"hydra.launcher.gpus_per_node=8": "hydra.launcher.tasks_per_node=1"}
SMALLER = (
    "training.device=cpu training.num_train_steps=20 training.train_batch_size=4 training.warmup_steps=5 "
    "model.hidden_size=32 model.n_blocks=1 model.n_heads=2 model.head_dim=16 model.cond_dim=32 "
    "logging.num_samples=1 logging.num_eval_batches=1"
)
SMALLER_DEMO = "decoding.candidates=1 loss.cycle_text_warmup_steps=5 loss.cycle_latent_warmup_steps=5"


def smaller(block: Block) -> Block:
    """The block with what it submits made small."""
    text = re.sub(r"\\\n *", "", block.text)
    for printed, here in FEWER_RANKS.items():
        text = text.replace(printed, here)
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if "slurm submit" in line:
            lines[number] = f"{line} {SMALLER} {SMALLER_DEMO if '--config-name demo' in line else ''}"
        elif "job.prepare" in line:
            lines[number] = f"{line} --max-samples 500"
    return replace(block, text="\n".join(lines))


def test_the_tutorial_can_be_followed(slurm: Slurm, tmp_path: Path) -> None:
    blocks = [block for block in blocks_of(ROOT / "docs" / "tutorials" / "sweep-on-slurm.md") if block.slurm]
    assert sum(block.text.count(printed) for block in blocks for printed in FEWER_RANKS) == 2
    weights = [tmp_path / "runs" / "weights" / f"loss.cycle_text_weight={weight}" for weight in ("0.05", "0.1", "0.2")]
    runs = [tmp_path / "runs" / "first", *weights]
    try:
        first, _, _, _, compared = [run(smaller(block), tmp_path, slurm.cluster.env) for block in blocks]
    finally:
        files = [path / "slurm" / "submission.json" for path in runs]
        slurm.jobs.extend(json.loads(file.read_text())["job"] for file in files if file.exists())
    assert [max(losses(path)) for path in runs] == [20, 20, 20, 20]
    assert re.search(r"^ *0: finished: .*runs/first$", first, re.M), "logs -f stays to the end"
    assert re.search(r"^ *0: finished: .*=0\.1$", compared, re.M)
    assert all(weight in compared for weight in ("0.05", "0.1", "0.2"))
    assert (tmp_path / "compare.html").stat().st_size > 1000

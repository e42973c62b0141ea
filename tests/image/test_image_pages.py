"""What the page about the image tells a reader to type, typed with podman."""

from __future__ import annotations

from pathlib import Path

import build
from container import MARKS
from doc_blocks import ROOT, SMALLER, SMALLER_DEMO, blocks_of, run, smaller, times_printed

pytestmark = MARKS
# What this machine cannot do as printed, and what is done instead.
HERE = {
    "docker run": "podman run",
    " cyclevae:0.1.0 ": f" {build.IMAGE} ",
    "--gpus all ": "",
    "--nproc_per_node=8": "--nproc_per_node=2",
    "--source unicode": "--source unicode --max-samples 500",
    "--config-name demo": f"--config-name demo {SMALLER} {SMALLER_DEMO}",
}


def test_the_image_is_run_as_the_page_says(tmp_path: Path) -> None:
    build.image()
    blocks = [block for block in blocks_of(ROOT / "docs" / "how-to" / "run-the-image.md") if block.suite == "image"]
    assert [times_printed(blocks, printed) for printed in HERE] == [2, 2, 1, 1, 1, 1]
    for block in blocks:
        run(smaller(block, HERE), tmp_path, build.environment())
    assert (tmp_path / "runs" / "demo" / "result.json").is_file()

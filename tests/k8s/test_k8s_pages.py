"""What the tutorial of Kubernetes tells a reader to type, typed on the tests' own cluster."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks_of, missing, run, smaller, times_printed
from k8s_claims import Claims
from k8s_node import Node
from k8s_runs import IMAGE

pytest_plugins = ["k8s_lab"]
pytestmark = pytest.mark.timeout(1200)
# What this cluster cannot do as printed, and what is done instead. The image is a variable of the reader's.
HERE = {
    "hydra.launcher.nodes=2 hydra.launcher.gpus_per_node=8": "hydra.launcher.tasks_per_node=1",
    "--source,unicode": "--max-samples,500,--source,unicode",
    "kubectl apply": "kubectl apply --validate=false",  # the server is older than a field of the network policy
}
WEIGHTS = ("0.05", "0.1", "0.2")


def clone(directory: Path) -> Path:
    """What the commands need of a clone. Pods that no played operator makes must ask for the host's network."""
    directory.mkdir()
    shutil.copytree(ROOT / "k8s", directory / "k8s")
    pod = directory / "k8s" / "shell" / "pod.yaml"
    assert pod.read_text().count("\nspec:\n") == 1
    pod.write_text(pod.read_text().replace("\nspec:\n", "\nspec:\n  hostNetwork: true\n"))
    (directory / "my_texts").mkdir()
    (directory / "my_texts" / "docs.txt").write_text("a text\n")
    return directory


def test_the_tutorial_can_be_followed(
    own_node: Node, operator: None, train_jobs: None, image: None, overlay_claims: Claims, tmp_path: Path
) -> None:
    """With both operators: runs become TrainJobs, and the overlay of the last section a PyTorchJob."""
    page = ROOT / "docs" / "tutorials" / "sweep-on-kubernetes.md"
    assert "export IMAGE=" in page.read_text()
    blocks = [block for block in blocks_of(page) if block.suite == "k8s"]
    assert [times_printed(blocks, printed) for printed in HERE] == [1, 1, 4]
    here = clone(tmp_path / "clone")
    variables = {**own_node.env, "KUBECONFIG": str(own_node.kubeconfig_with("reader.kubeconfig")), "IMAGE": IMAGE}
    for block in blocks:
        printed = run(smaller(block, HERE), here, variables)
        print(f"$ {block.text}\n{printed}")
        assert not missing(block.shown, printed), "the page shows what was not printed"
    points = [f"weights/loss.cycle_text_weight={weight}" for weight in WEIGHTS]
    assert [overlay_claims.last_step(name) for name in ("first", *points)] == [20, 20, 20, 20]
    assert (here / "compare.html").stat().st_size > 1000
    assert (here / "runs" / "first" / "result.json").is_file()
    assert (tmp_path / "data" / "my_texts" / "docs.txt").read_text() == "a text\n"

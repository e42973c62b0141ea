"""What the Kubernetes tests do with runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from k8s_node import Node, wait_for

ROOT = Path(__file__).parent.parent.parent
IMAGE = "cyclevae:test"
TINY = [
    "model=small",
    "model.hidden_size=32",
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.head_dim=16",
    "model.cond_dim=32",
    "model.max_seq_len=16",
    "data=synthetic",
    "data.synthetic_samples=40",
    "data.synthetic_vocab_size=32",
    "data.synthetic_latent_dim=8",
    "model.dropout=0.1",
    "training.device=cpu",
    "training.warmup_steps=10",
    "training.eval_batch_size=4",
    "logging.log_freq=1",
    "logging.eval_freq=0",
    "logging.num_samples=1",
    "logging.num_eval_batches=1",
]
SLOW = """import os, pathlib, time
opened = pathlib.Path.open
def slowly_opened(path, *arguments, **options):
    if path.name == "training_log.jsonl" and os.path.exists(__file__):
        time.sleep(1)
    return opened(path, *arguments, **options)
pathlib.Path.open = slowly_opened
"""


def cyclevae(
    kubernetes: Node, *arguments: str, kubeconfig: Path | None = None, seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS...` with the cluster as the current one."""
    env = {**kubernetes.env, "KUBECONFIG": str(kubeconfig or kubernetes.env["KUBECONFIG"])}
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, text=True, capture_output=True, timeout=seconds
    )


def losses(run: Path) -> dict[int, dict[str, float]]:
    """What no clock makes of a run's training log, by step."""
    path = run / "training_log.jsonl"
    lines = [json.loads(line) for line in (path.read_text().split("\n")[:-1] if path.exists() else [])]
    assert len({line["step"] for line in lines}) == len(lines), "a step was logged twice"
    return {
        line["step"]: {
            name: value for name, value in line.items() if "loss" in name or name in ("lr", "grad_norm", "epoch")
        }
        for line in lines
    }


class Claims:
    """The claims of runs and data of a namespace, kept in a directory of this machine."""

    def __init__(self, kubernetes: Node, namespace: str, directory: Path) -> None:
        self.kubernetes, self.namespace, self.runs = kubernetes, namespace, directory / "runs"
        objects = []
        for claim in yaml.safe_load_all((ROOT / "k8s" / "base" / "claims.yaml").read_text()):
            name, spec = claim["metadata"]["name"], claim["spec"]
            (directory / name).mkdir()
            (directory / name).chmod(
                0o777
            )  # what fsGroup does on volumes of a cluster, but not on a directory of the node
            objects.append(
                {
                    "apiVersion": "v1",
                    "kind": "PersistentVolume",
                    "metadata": {"name": f"{namespace}-{name}"},
                    "spec": {
                        "accessModes": spec["accessModes"],
                        "capacity": spec["resources"]["requests"],
                        "hostPath": {"path": str(directory / name)},
                        "claimRef": {"namespace": namespace, "name": name},
                    },
                }
            )
        kubernetes.kubectl("create", "--filename=-", stdin=yaml.safe_dump_all(objects))

    def apply(self) -> None:
        self.kubernetes.kubectl(
            "apply", f"--namespace={self.namespace}", "--filename", str(ROOT / "k8s" / "base" / "claims.yaml")
        )

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        """Runs with PYTHONPATH=/runs/slow log a step a second: none ends before the test comes to disturb it."""
        (self.runs / "slow").mkdir()
        (self.runs / "slow" / "sitecustomize.py").write_text(SLOW)
        yield
        shutil.rmtree(self.runs / "slow")

    def reached(self, run: str, step: int, seconds: float = 200) -> None:
        """Wait until a run has logged a step."""
        wait_for(lambda: max(losses(self.runs / run), default=0) >= step, f"{run}: step {step}", seconds)

    def job(self, name: str, condition: str, seconds: float = 200) -> None:
        """Wait for a job's condition."""
        self.kubernetes.run(
            "kubectl",
            "wait",
            f"--for=condition={condition}",
            f"pytorchjob/{name}",
            f"--namespace={self.namespace}",
            f"--timeout={seconds}s",
            seconds=seconds + 30,
        )

"""What the Kubernetes tests do with runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from k8s_access import Access

ROOT = Path(__file__).parent.parent.parent
IMAGE = os.environ.get("CYCLEVAE_TEST_IMAGE", "cyclevae:test")
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


def cyclevae(
    kubernetes: Access, *arguments: str, kubeconfig: Path | None = None, seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS...` with the cluster as the current one."""
    env = {**kubernetes.env, "KUBECONFIG": str(kubeconfig or kubernetes.env["KUBECONFIG"])}
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, text=True, capture_output=True, timeout=seconds
    )


# In the pod: the rank is a child of the first process (attempt.py), which has job.train among its arguments as well.
SIGNAL_RANK = """import os, pathlib, signal, sys
commands = {int(path.parent.name): path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")}
ranks = [pid for pid, words in commands.items() if b"job.train" in words and b"kubernetes.attempt" not in words]
os.kill(min(ranks), getattr(signal, sys.argv[1]))
"""


def signal_rank(kubernetes: Access, namespace: str, pod: str, name: str) -> None:
    """Send a signal to a rank within its pod, such as SIGKILL."""
    kubernetes.kubectl("exec", f"--namespace={namespace}", pod, "--", "python", "-c", SIGNAL_RANK, name)


def objects_of(kubernetes: Access, overlay: Path, namespace: str | None = None) -> list[dict[str, Any]]:
    """What an overlay holds. With `namespace` it is for a cluster that is there: only what belongs to a namespace.

    That namespace has its claims, and its pods no priority: both are the cluster's own.
    """
    objects: list[dict[str, Any]] = list(yaml.safe_load_all(kubernetes.kubectl("kustomize", str(overlay))))
    if namespace is None:
        return objects
    kept = [one for one in objects if one["kind"] not in ("Namespace", "PriorityClass", "PersistentVolumeClaim")]
    for one in kept:
        one["metadata"]["namespace"] = namespace
    text = re.sub(r"\n *priorityClassName: .*", "", yaml.safe_dump_all(kept))
    return list(yaml.safe_load_all(text))


def apply_overlay(
    kubernetes: Access, overlay: Path, namespace: str
) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """The objects of an overlay, and what `kubectl apply` said to them: to those for `namespace` on a given cluster."""
    apply = ["kubectl", "apply", "--validate=false"]  # the server of the tests' own cluster is older than endPort
    objects = objects_of(kubernetes, overlay, namespace if kubernetes.given else None)
    if not kubernetes.given:
        return objects, subprocess.run([*apply, "-k", str(overlay)], env=kubernetes.env, text=True, capture_output=True)
    command, text = [*apply, "--filename=-"], yaml.safe_dump_all(objects)
    return objects, subprocess.run(command, env=kubernetes.env, text=True, capture_output=True, input=text)


def losses(log: str | None) -> dict[int, dict[str, float]]:
    """What no clock makes of a run's training log, by step."""
    lines = [json.loads(line) for line in (log.split("\n")[:-1] if log else [])]
    assert len({line["step"] for line in lines}) == len(lines), "a step was logged twice"
    return {
        line["step"]: {
            name: value for name, value in line.items() if "loss" in name or name in ("lr", "grad_norm", "epoch")
        }
        for line in lines
    }

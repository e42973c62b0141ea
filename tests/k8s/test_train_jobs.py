"""TrainJobs, and queues: Kubeflow Trainer and Kueue are played (k8s_trainer.py), pods, server and launcher are real."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from k8s_node import Node, wait_for
from k8s_operator import TrainingOperator
from k8s_runs import IMAGE, ROOT, TINY, Claims, cyclevae, losses
from k8s_trainer import Kueue, Trainer

pytest_plugins = ["k8s_lab"]


class Launcher:
    """`cyclevae k8s` in a namespace."""

    def __init__(self, kubernetes: Node, namespace: str) -> None:
        self._kubernetes, self._where = kubernetes, f"--namespace={namespace}"

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = cyclevae(self._kubernetes, "-m", "job", "k8s", arguments[0], self._where, *arguments[1:])
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def row(self, job: str) -> dict[str, Any]:
        (row,) = json.loads(self("status", "--json", job))
        return dict(row)


def install_runtime(kubernetes: Node, namespace: str) -> None:
    """k8s/runtime with the tests' image, without what the overlays' namespace has beside it."""
    runtime = yaml.safe_load((ROOT / "k8s" / "runtime" / "runtime.yaml").read_text())
    (nodes,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    spec = nodes["template"]["spec"]["template"]["spec"]
    spec["containers"][0]["image"] = IMAGE
    for absent in ("priorityClassName", "serviceAccountName"):
        del spec[absent]
    kubernetes.kubectl("create", f"--namespace={namespace}", "--filename=-", stdin=yaml.safe_dump(runtime))


def test_an_overlay_is_taken_at_once_and_its_pods_are_made(kubernetes: Node, train_jobs: Trainer) -> None:
    """The runtime is there when Trainer copies it."""
    kubernetes.kubectl("apply", "-k", str(ROOT / "k8s" / "overlays" / "trainjob"), "--validate=false")
    pods = ("get", "pods", "--namespace=cyclevae", "--selector=jobset.sigs.k8s.io/jobset-name=trainjob")
    wait_for(lambda: len(kubernetes.kubectl(*pods, "--output=name").split()) == 2, "2 pods")
    kubernetes.kubectl("delete", "trainjob", "trainjob", "--namespace=cyclevae")


def test_a_queued_job_says_why_and_is_cancelled_and_resumed(
    kubernetes: Node, operator: TrainingOperator, kueue: Kueue, claims: Claims
) -> None:
    k8s = Launcher(kubernetes, claims.namespace)
    queue = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "metadata": {"name": "gold"}}
    kubernetes.kubectl("create", f"--namespace={claims.namespace}", "--filename=-", stdin=yaml.safe_dump(queue))
    kueue.room = False
    k8s("submit", *TINY, "logging.run_name=one", f"hydra.launcher.container.image={IMAGE}", "hydra.launcher.queue=gold")
    wait_for(lambda: k8s.row("one")["reason"], "Kueue's words")
    row = k8s.row("one")
    assert (row["state"], "insufficient quota for cpu in flavor default" in row["reason"]) == ("QUEUED", True), row
    k8s("cancel", "one")
    assert k8s.row("one")["state"] == "SUSPENDED"
    kueue.room = True
    kubernetes.kubectl("annotate", "pytorchjob", "one", f"--namespace={claims.namespace}", "touched=yes")
    assert k8s.row("one")["state"] == "SUSPENDED", "room or not: it was cancelled"
    k8s("resume", "one")
    wait_for(lambda: k8s.row("one")["state"] not in ("SUSPENDED", "QUEUED"), "Kueue to let it run")


@pytest.mark.timeout(900)
def test_a_train_job_is_cancelled_resumed_and_loses_a_pod(
    kubernetes: Node, train_jobs: Trainer, image: None, claims: Claims
) -> None:
    """On a cluster that knows both kinds a run becomes a TrainJob."""
    k8s, where = Launcher(kubernetes, claims.namespace), f"--namespace={claims.namespace}"
    install_runtime(kubernetes, claims.namespace)
    run = [
        "logging.run_name=both",
        "training.num_train_steps=60",
        "training.global_batch_size=4",
        "logging.save_freq=50",
    ]
    size = ["hydra.launcher.nodes=2", "hydra.launcher.cpus_per_task=1", "training.train_batch_size=2"]
    with claims.slow():
        k8s("submit", *TINY, *run, *size, "+hydra.launcher.container.env.PYTHONPATH=/runs/slow")
        claims.reached("both", 3)
        row = k8s.row("both")
        assert (row["state"], row["steps"]) == ("RUNNING", 60), row
        k8s("cancel", "both")
        pods = ("get", "pods", where, "--output=name")
        wait_for(lambda: kubernetes.kubectl(*pods) == "", "the pods to be gone")
        cancelled = k8s.row("both")
        assert (cancelled["state"], cancelled["steps"]) == ("SUSPENDED", 60)
        assert cancelled["step"] >= row["step"], "it is known without pods"
        saved = max(losses(claims.runs / "both"))
        k8s("resume", "both")
        claims.reached("both", saved + 3)
        kubernetes.kubectl("delete", where, kubernetes.kubectl(*pods).split()[0])
        stopped = max(losses(claims.runs / "both"))
        claims.reached("both", stopped + 3)
    assert "COMPLETED" in k8s("wait", "both")
    assert list(losses(claims.runs / "both")) == list(range(1, 61))
    assert k8s.row("both")["state"] == "COMPLETED"

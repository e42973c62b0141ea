"""TrainJobs, and queues: pods, server and launcher are real; Trainer and Kueue too on a cluster that is there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from k8s_access import Access, wait_for
from k8s_claims import Claims
from k8s_queues import Queue
from k8s_runs import IMAGE, ROOT, TINY, apply_overlay, cyclevae, signal_rank

pytest_plugins = ["k8s_lab"]


class Launcher:
    """`cyclevae k8s` in a namespace."""

    def __init__(self, kubernetes: Access, namespace: str) -> None:
        self._kubernetes, self._where = kubernetes, f"--namespace={namespace}"

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = cyclevae(self._kubernetes, "-m", "job", "k8s", arguments[0], self._where, *arguments[1:])
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def row(self, job: str) -> dict[str, Any]:
        (row,) = json.loads(self("status", "--json", job))
        return dict(row)


def install_runtime(kubernetes: Access, namespace: str) -> None:
    """k8s/runtime with the tests' image, without what the overlays' namespace has beside it."""
    runtime = yaml.safe_load((ROOT / "k8s" / "runtime" / "runtime.yaml").read_text())
    (nodes,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    spec = nodes["template"]["spec"]["template"]["spec"]
    spec["containers"][0]["image"] = IMAGE
    for absent in ("priorityClassName", "serviceAccountName"):
        del spec[absent]
    kubernetes.kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=yaml.safe_dump(runtime))


def test_an_overlay_is_taken_at_once_and_its_pods_are_made(
    kubernetes: Access, train_jobs: None, namespace: str
) -> None:
    """The runtime is there when Trainer copies it."""
    _, applied = apply_overlay(kubernetes, ROOT / "k8s" / "overlays" / "trainjob", namespace)
    assert applied.returncode == 0, applied.stderr
    if not kubernetes.given:
        namespace = "cyclevae"
    where = f"--namespace={namespace}"
    pods = ("get", "pods", where, "--selector=jobset.sigs.k8s.io/jobset-name=trainjob")
    wait_for(lambda: len(kubernetes.kubectl(*pods, "--output=name").split()) == 2, "2 pods")
    kubernetes.kubectl("delete", "trainjob", "trainjob", where)


def queued(name: str, queue: Queue, kind: str, steps: int) -> list[str]:
    """A run of one pod in a queue, which logs a step a second."""
    run = [*TINY, f"logging.run_name={name}", f"training.num_train_steps={steps}", "logging.save_freq=50"]
    where = [f"hydra.launcher.queue={queue.name}", f"hydra.launcher.kind={kind}", "hydra.launcher.cpus_per_task=1"]
    slow = "+hydra.launcher.container.env.PYTHONPATH=/runs/slow"
    return [*run, *where, slow, f"hydra.launcher.container.image={IMAGE}"]


KINDS = ("pytorchjob", "trainjob")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, kubernetes: Access, claims: Claims) -> str:
    """Each kind of job, with the operator that it needs."""
    if request.param == "pytorchjob":
        request.getfixturevalue("operator")
    else:
        request.getfixturevalue("train_jobs")
        install_runtime(kubernetes, claims.namespace)
    return str(request.param)


def test_a_queued_job_says_why_and_is_cancelled_and_resumed(
    kubernetes: Access, image: None, claims: Claims, kind: str, queue: Queue
) -> None:
    k8s, where = Launcher(kubernetes, claims.namespace), f"--namespace={claims.namespace}"
    queue.close()
    with claims.slow():
        k8s("submit", *queued("one", queue, kind, 20))
        if queue.words:
            wait_for(lambda: k8s.row("one")["reason"], "Kueue's words")
        row = k8s.row("one")
        assert (row["state"], queue.words in (row["reason"] or "")) == ("QUEUED", True), row
        k8s("cancel", "one")
        assert k8s.row("one")["state"] == "SUSPENDED"
        queue.open()
        kubernetes.kubectl("annotate", kind, "one", where, "touched=yes")
        assert k8s.row("one")["state"] == "SUSPENDED", "room or not: it was cancelled"
        k8s("resume", "one")
        claims.reached("one", 2)
    assert "COMPLETED" in k8s("wait", "one")
    assert list(claims.losses("one")) == list(range(1, 21))


@pytest.mark.timeout(900)
def test_a_job_is_preempted_and_goes_on_when_there_is_room(
    kubernetes: Access, image: None, claims: Claims, kind: str, queue: Queue
) -> None:
    k8s = Launcher(kubernetes, claims.namespace)
    pods = ("get", "pods", f"--namespace={claims.namespace}", f"--selector={POD_LABELS[kind]}=queued", "--output=name")
    with claims.slow():
        k8s("submit", *queued("queued", queue, kind, 60))
        claims.reached("queued", 3)
        assert k8s.row("queued")["state"] == "RUNNING"
        with claims.disturbed("queued", f"preempted by Kueue, with room again at once ({kind})"):
            queue.close()
            wait_for(lambda: kubernetes.kubectl(*pods) == "", "the pod to be gone")
            assert k8s.row("queued")["state"] == "QUEUED"
            saved = max(int(name[5:]) for name in claims.names("queued/checkpoints") if name.startswith("step_"))
            assert saved == claims.last_step("queued"), "it was told to stop, and saved"
            queue.open()
    assert "COMPLETED" in k8s("wait", "queued")
    assert list(claims.losses("queued")) == list(range(1, 61))


POD_LABELS = {"pytorchjob": "training.kubeflow.org/job-name", "trainjob": "jobset.sigs.k8s.io/jobset-name"}


@pytest.mark.timeout(900)
def test_a_train_job_is_cancelled_resumed_and_loses_a_pod(
    kubernetes: Access, train_jobs: None, image: None, claims: Claims
) -> None:
    """On a cluster that knows both kinds a run becomes a TrainJob."""
    k8s, where = Launcher(kubernetes, claims.namespace), f"--namespace={claims.namespace}"
    install_runtime(kubernetes, claims.namespace)
    run = [
        "logging.run_name=both",
        "training.num_train_steps=60",
        "training.global_batch_size=4",
        "logging.save_freq=2",
    ]
    size = ["hydra.launcher.nodes=2", "hydra.launcher.cpus_per_task=1", "training.train_batch_size=2"]
    with claims.slow():
        k8s(
            "submit",
            *TINY,
            *run,
            *size,
            "hydra.launcher.kind=trainjob",
            "+hydra.launcher.container.env.PYTHONPATH=/runs/slow",
        )
        claims.reached("both", 3)
        row = k8s.row("both")
        assert (row["state"], row["steps"]) == ("RUNNING", 60), row
        k8s("cancel", "both")
        selector = f"--selector={POD_LABELS['trainjob']}=both"
        pods = ("get", "pods", where, selector, "--output=name")
        wait_for(lambda: kubernetes.kubectl(*pods) == "", "the pods to be gone")
        cancelled = k8s.row("both")
        assert (cancelled["state"], cancelled["steps"]) == ("SUSPENDED", 60), cancelled
        assert cancelled["step"] >= row["step"], "it is known without pods"
        saved = claims.last_step("both")
        k8s("resume", "both")
        claims.reached("both", saved + 3)
        with claims.disturbed("both", "a pod of two deleted (trainjob)"):
            kubernetes.kubectl("delete", where, kubernetes.kubectl(*pods).split()[0])
        with claims.disturbed("both", "a rank of two killed (SIGKILL, trainjob)"):
            running = kubernetes.kubectl(*pods, "--field-selector=status.phase=Running").split()
            signal_rank(kubernetes, claims.namespace, running[-1], "SIGKILL")
    assert "COMPLETED" in k8s("wait", "both")
    assert list(claims.losses("both")) == list(range(1, 61))
    assert k8s.row("both")["state"] == "COMPLETED"

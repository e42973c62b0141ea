"""Runs of the real image in real pods, which the training operator, played, makes and makes again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from k8s_node import NODE, Node, wait_for
from k8s_operator import TrainingOperator
from k8s_runs import IMAGE, ROOT, TINY, Claims, cyclevae, losses

pytest_plugins = ["k8s_lab"]
STEPS = 40
SMALL = [*TINY, "logging.save_freq=50", f"hydra.launcher.container.image={IMAGE}", "hydra.launcher.cpus_per_task=1"]


@pytest.fixture
def demo(kubernetes: Node, operator: TrainingOperator, image: None, tmp_path: Path) -> Iterator[Claims]:
    """The claims of the overlays' namespace."""
    kubernetes.kubectl("delete", "namespace", "cyclevae", "--ignore-not-found")
    yield Claims(kubernetes, "cyclevae", tmp_path)
    kubernetes.kubectl("delete", "namespace", "cyclevae")  # others apply overlays to it


def shortened_demo(directory: Path, job: str) -> Path:
    """The overlay cpu-demo with the tests' image, fewer steps, and this name of the job; the run is still cpu-demo."""
    overlay = directory / job
    container = "/spec/pytorchReplicaSpecs/Worker/template/spec/containers/0"
    overrides = [
        f"training.num_train_steps={STEPS}",
        "training.warmup_steps=10",
        "logging.log_freq=1",
        "logging.eval_freq=0",
        "logging.save_freq=10",
        "logging.num_samples=1",
        "logging.num_eval_batches=1",
    ]
    overlay.mkdir()
    changes = [
        {"op": "replace", "path": "/metadata/name", "value": job},
        {"op": "add", "path": f"{container}/env/-", "value": {"name": "PYTHONPATH", "value": "/runs/slow"}},
        *({"op": "add", "path": f"{container}/command/-", "value": one} for one in overrides),
    ]
    (overlay / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "resources": [os.path.relpath(ROOT / "k8s" / "overlays" / "cpu-demo", overlay)],
                "images": [
                    {"name": "registry.example/cyclevae", "newName": IMAGE.split(":")[0], "newTag": IMAGE.split(":")[1]}
                ],
                "patches": [{"target": {"kind": "PyTorchJob"}, "patch": yaml.safe_dump(changes)}],
            }
        )
    )
    return overlay


@pytest.mark.timeout(1800)
def test_two_workers_lose_a_pod_then_their_node_and_end_like_an_undisturbed_run(
    kubernetes: Node, demo: Claims, tmp_path: Path
) -> None:
    pods = (
        "get",
        "pods",
        "--namespace=cyclevae",
        "--selector=training.kubeflow.org/job-name=cpu-demo",
        "--output=jsonpath={.items[*].metadata.uid}",
    )

    def apply(job: str) -> None:
        kubernetes.kubectl(
            "apply", "-k", str(shortened_demo(tmp_path, job)), "--validate=false"
        )  # endPort is newer than the server

    apply("calm")
    demo.job("calm", "Succeeded", 400)
    calm = losses(demo.runs / "cpu-demo")
    assert list(calm) == list(range(1, STEPS + 1))
    wait_for(
        lambda: "Running" not in kubernetes.kubectl("get", "pods", "--namespace=cyclevae", check=False),
        "both pods to end",
    )
    (demo.runs / "cpu-demo").rename(demo.runs / "calm")

    with demo.slow():
        apply("cpu-demo")
        demo.reached("cpu-demo", 5)
        first = set(kubernetes.kubectl(*pods).split())
        assert len(first) == 2
        status = cyclevae(kubernetes, "-m", "job", "k8s", "status", "--json", "--namespace=cyclevae", "cpu-demo")
        (row,) = json.loads(status.stdout)
        assert (row["state"], row["steps"]) == ("RUNNING", STEPS), (
            row
        )  # from the log: the API server passes no requests for metrics on to 127.0.0.1
        assert row["step"] >= 5
        kubernetes.kubectl("delete", "pod", "cpu-demo-worker-1", "--namespace=cyclevae")
        wait_for(lambda: not first & set(kubernetes.kubectl(*pods).split()), "new pods")
        stopped = max(losses(demo.runs / "cpu-demo"))
        demo.reached("cpu-demo", stopped + 5)
        kubernetes.kubectl("drain", NODE, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=120s")
        evicted = max(losses(demo.runs / "cpu-demo"))
        assert stopped < evicted < STEPS
    kubernetes.kubectl("uncordon", NODE)
    demo.job("cpu-demo", "Succeeded")
    assert losses(demo.runs / "cpu-demo") == calm


@pytest.mark.timeout(900)
def test_a_sweep_of_which_one_point_fails(
    kubernetes: Node, operator: TrainingOperator, image: None, claims: Claims
) -> None:
    """The point that wants a GPU finds none, which only its pod can know."""
    done = cyclevae(
        kubernetes,
        "-m",
        "job.train",
        "--multirun",
        "hydra/launcher=pytorchjob",
        f"hydra.launcher.namespace={claims.namespace}",
        *(override for override in SMALL if override != "training.device=cpu"),
        "logging.run_name=sweep",
        "training.num_train_steps=5",
        "training.warmup_steps=0",
        "training.device=cpu,cuda",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: 1 of 2 runs did not finish" in done.stderr
    assert "COMPLETED  (training.device=cpu)" in done.stdout
    assert "FAILED (exit code 1)  (training.device=cuda)" in done.stdout
    assert "training.device=cuda, but PyTorch sees no GPU here" in done.stdout
    assert "no failure was recorded" not in done.stdout, "it came with the pod's status, not from its log"
    assert sorted(losses(claims.runs / "sweep" / "training.device=cpu")) == [1, 2, 3, 4, 5]
    rows = json.loads(
        cyclevae(kubernetes, "-m", "job", "k8s", "list", "--json", f"--namespace={claims.namespace}").stdout
    )
    assert {row["run"][-3:]: row["state"] for row in rows} == {"cpu": "COMPLETED", "uda": "FAILED"}


@pytest.mark.timeout(900)
def test_cancelled_resumed_and_waited_for_while_the_server_is_away(
    kubernetes: Node, operator: TrainingOperator, image: None, claims: Claims
) -> None:
    where = f"--namespace={claims.namespace}"
    train = [
        *SMALL,
        "logging.run_name=long",
        "training.num_train_steps=300",
        "+hydra.launcher.container.env.PYTHONPATH=/runs/slow",
    ]

    def k8s(*arguments: str) -> str:
        done = cyclevae(kubernetes, "-m", "job", "k8s", *arguments, where)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with claims.slow():
        k8s("submit", *train)
        claims.reached("long", 2)
        with subprocess.Popen(
            [sys.executable, "-m", "job", "k8s", "logs", "-f", "long", where],
            env=kubernetes.env,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
        ) as following:
            assert following.stdout is not None
            assert "to 300" in following.stdout.readline()
            k8s("cancel", "long")
            assert "step " in following.stdout.read()
            assert following.wait() == 0, "it ends with the job"
        wait_for(lambda: kubernetes.kubectl("get", "pods", where, "--output=name") == "", "the pods to be gone")
        saved = max(int(path.name[5:]) for path in (claims.runs / "long" / "checkpoints").glob("step_*"))
        assert saved == max(losses(claims.runs / "long")) < 300, "a run that is told to stop saves"
        assert json.loads(k8s("list", "--json"))[0]["state"] == "SUSPENDED"
        k8s("resume", "long")
        claims.job("long", "Running")
        command = [
            "-m",
            "job.train",
            "--multirun",
            "hydra/launcher=pytorchjob",
            f"hydra.launcher.namespace={claims.namespace}",
            *train,
        ]
        waiting = subprocess.Popen(
            [sys.executable, *command],
            env=kubernetes.env,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert waiting.stdout is not None
        assert "RUNNING already" in waiting.stdout.readline()
        assert "RUNNING" in waiting.stdout.readline()
        kubernetes.kill_server()
        kubernetes.start_server()
    with waiting:
        out, err = waiting.communicate(timeout=300)
    assert waiting.returncode == 0, err
    assert "asking again" in err
    assert "job long: COMPLETED" in out
    assert list(losses(claims.runs / "long")) == list(range(1, 301))

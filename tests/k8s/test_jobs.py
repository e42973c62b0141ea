"""Runs of the real image in real pods, which the training operator makes and makes again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from k8s_access import Access, GivenCluster, wait_for
from k8s_claims import Claims, GivenClaims
from k8s_node import Node
from k8s_runs import IMAGE, ROOT, TINY, apply_overlay, cyclevae, signal_rank

pytest_plugins = ["k8s_lab"]
STEPS = 40
SMALL = [*TINY, "logging.save_freq=50", f"hydra.launcher.container.image={IMAGE}", "hydra.launcher.cpus_per_task=1"]


@pytest.fixture
def demo(kubernetes: Access, operator: None, image: None, request: pytest.FixtureRequest) -> Iterator[Claims]:
    """The claims of the overlays' namespace; of a cluster that is there, those of the tests' namespace."""
    if isinstance(kubernetes, GivenCluster):
        with kubernetes.swept():
            given = GivenClaims(kubernetes)
            given.refuse_taken("cpu-demo", "calm", "slow")
            yield given
            given.remove_new()
        return
    yield request.getfixturevalue("overlay_claims")


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
    kubernetes: Access, demo: Claims, tmp_path: Path
) -> None:
    where = f"--namespace={demo.namespace}"

    def apply(job: str) -> None:
        _, applied = apply_overlay(kubernetes, shortened_demo(tmp_path, job), demo.namespace)
        assert applied.returncode == 0, applied.stderr

    def pods() -> dict[str, str]:
        """The pods' names by their ids."""
        every = "--output=jsonpath={range .items[*]}{.metadata.uid} {.metadata.name}{'\\n'}{end}"
        selector = "--selector=training.kubeflow.org/job-name=cpu-demo"
        lines = kubernetes.kubectl("get", "pods", where, selector, every).splitlines()
        return dict(line.split() for line in lines)

    apply("calm")
    demo.job("calm", "Succeeded", 400)
    calm = demo.losses("cpu-demo")
    assert list(calm) == list(range(1, STEPS + 1))
    running = "--field-selector=status.phase=Running"
    selector = "--selector=training.kubeflow.org/job-name=calm"
    wait_for(lambda: not kubernetes.kubectl("get", "pods", where, running, selector, "--output=name"), "both to end")
    demo.move("cpu-demo", "calm")

    with demo.slow():
        apply("cpu-demo")
        demo.reached("cpu-demo", 5)
        first = pods()
        assert len(first) == 2
        status = cyclevae(kubernetes, "-m", "job", "k8s", "status", "--json", where, "cpu-demo")
        (row,) = json.loads(status.stdout)
        assert (row["state"], row["steps"]) == ("RUNNING", STEPS), row
        assert row["step"] >= 5
        with demo.disturbed("cpu-demo", "a pod of two deleted"):
            kubernetes.kubectl("delete", "pod", "cpu-demo-worker-1", where)
        assert not first.keys() & pods().keys()
        with demo.disturbed("cpu-demo", "both pods evicted"):
            for name in pods().values():
                evict(kubernetes, demo.namespace, name)
        assert demo.last_step("cpu-demo") < STEPS
    demo.job("cpu-demo", "Succeeded")
    assert demo.losses("cpu-demo") == calm


def evict(kubernetes: Access, namespace: str, pod: str) -> None:
    """What `kubectl drain` asks of the server for every pod of a node."""
    version = "policy/v1" if "eviction" in kubernetes.kubectl("get", "--raw", "/apis/policy/v1", check=False) else None
    version = version or "policy/v1beta1"
    eviction = {"apiVersion": version, "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace}}
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}/eviction"
    kubernetes.kubectl("create", "--raw", path, "--filename=-", stdin=json.dumps(eviction))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "signal"), [("killed", "SIGKILL"), ("frozen", "SIGSTOP")])
def test_a_rank_that_is_lost(
    name: str, signal: str, kubernetes: Access, operator: None, image: None, claims: Claims
) -> None:
    """The other names it, and both pods are made again; the losses are those of a run that nothing happens to."""
    where = f"--namespace={claims.namespace}"
    run = [*SMALL, f"logging.run_name={name}", "training.num_train_steps=60", "logging.save_freq=2"]
    size = ["hydra.launcher.nodes=2", "training.global_batch_size=4", "training.train_batch_size=2"]
    more = ["hydra.launcher.kind=pytorchjob", "training.sick_rank_timeout_seconds=15"]
    slow = "+hydra.launcher.container.env.PYTHONPATH=/runs/slow"
    with claims.slow():
        done = cyclevae(kubernetes, "-m", "job", "k8s", "submit", where, *run, *size, *more, slow)
        assert done.returncode == 0, done.stderr
        claims.reached(name, 5)
        with claims.disturbed(name, f"a rank of two {name} ({signal})"):
            signal_rank(kubernetes, claims.namespace, f"{name}-worker-1", signal)
    claims.job(name, "Succeeded")
    assert list(claims.losses(name)) == list(range(1, 61))


@pytest.mark.timeout(900)
def test_a_sweep_of_which_one_point_fails(kubernetes: Access, operator: None, image: None, claims: Claims) -> None:
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
    assert sorted(claims.losses("sweep/training.device=cpu")) == [1, 2, 3, 4, 5]
    rows = json.loads(
        cyclevae(kubernetes, "-m", "job", "k8s", "list", "--json", f"--namespace={claims.namespace}").stdout
    )
    assert {row["run"][-3:]: row["state"] for row in rows} == {"cpu": "COMPLETED", "uda": "FAILED"}


@pytest.mark.timeout(900)
def test_cancelled_resumed_and_waited_for_while_the_server_is_away(
    kubernetes: Access, operator: None, image: None, claims: Claims
) -> None:
    where = f"--namespace={claims.namespace}"
    train = [
        *SMALL,
        "logging.run_name=long",
        "training.num_train_steps=300",
        "+hydra.launcher.container.env.PYTHONPATH=/runs/slow",
        "hydra.launcher.kind=pytorchjob",
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
        pods = ("get", "pods", where, "--selector=training.kubeflow.org/job-name=long", "--output=name")
        wait_for(lambda: kubernetes.kubectl(*pods) == "", "the pods to be gone")
        saved = max(int(name[5:]) for name in claims.names("long/checkpoints") if name.startswith("step_"))
        assert saved == claims.last_step("long") < 300, "a run that is told to stop saves"
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
        if isinstance(kubernetes, Node):
            kubernetes.kill_server()
            kubernetes.start_server()
    with waiting:
        out, err = waiting.communicate(timeout=300)
    assert waiting.returncode == 0, err
    assert ("asking again" in err) is isinstance(kubernetes, Node)
    assert "job long: COMPLETED" in out
    assert list(claims.losses("long")) == list(range(1, 301))

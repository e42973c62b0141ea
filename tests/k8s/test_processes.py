"""The pods of a PyTorchJob as processes of this machine: its container's command, with the operator's environment."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from k8s_access import wait_for
from k8s_node import free_ports
from k8s_operator import environment, labels, trainer, with_defaults
from k8s_runs import ROOT, TINY

from job.errors import ExitCode
from job.launch.kubernetes.manifests import pytorch_job
from job.launch.kubernetes.pods import LaunchedRun
from job.launch.kubernetes.settings import ContainerSettings, Settings

pytestmark = [
    pytest.mark.skipif("CYCLEVAE_TEST_K8S" not in os.environ, reason="a minute of processes: `make test-k8s`"),
    pytest.mark.timeout(900),
]
STEPS = 24


class Pods:
    """Replicas of a job of two nodes; each has one rank."""

    def __init__(self, directory: Path, *overrides: str, **settings: Any) -> None:
        self.run, self._directory = directory / "run", directory
        where = [f"logging.save_dir={directory}", "logging.run_name=run"]
        run = LaunchedRun(
            "run",
            str(self.run),
            [*TINY, *where, "training.global_batch_size=4", "monitoring.enabled=false", *overrides],
            port=None,
        )
        self._job = with_defaults(
            pytorch_job(run, Settings(nodes=2, container=ContainerSettings(image="image"), **settings))
        )
        self._meeting_point = f"127.0.0.1:{free_ports(1)[0]}"
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, index: int) -> None:
        container = trainer(self._job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"])
        known = {f"metadata.labels['{name}']": value for name, value in labels(self._job, "Worker", index).items()} | {
            "status.podIP": "127.0.0.1"
        }
        own = {
            one["name"]: one["value"] if "value" in one else known[one["valueFrom"]["fieldRef"]["fieldPath"]]
            for one in container["env"]
        }
        given = environment(self._job, "Worker", index)
        assert given["PET_RDZV_ENDPOINT"] == "run-worker-0:23456"
        given["PET_RDZV_ENDPOINT"] = self._meeting_point
        given["PET_RDZV_CONF"] += ",last_call_timeout=2"  # how long enough nodes wait for more
        assert container["command"][:3] == ["tini", "--", "python"]
        with self._log(index).open("ab") as output:
            self._processes[index] = subprocess.Popen(
                [sys.executable, *container["command"][3:]],
                cwd="/",
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **own, **given, "OMP_NUM_THREADS": "1"},
            )

    def _log(self, index: int) -> Path:
        return self._directory / f"{index}.log"

    def said(self, index: int) -> str:
        return self._log(index).read_text()

    def steps(self) -> list[int]:
        path = self.run / "training_log.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def ranks(self, index: int) -> list[int]:
        """Process ids; ranks have sessions of their own."""
        pid = self._processes[index].pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def exit_code(self, index: int) -> int:
        return self._processes[index].wait(240)

    def trains(self, index: int, nodes: int, starts: int) -> None:
        """Wait until the node's rank has been started `starts` times and trains, with so many nodes in all."""

        def ready() -> bool:
            _, found, after = self.said(index).rpartition(f", {nodes} x cpu, from step ")
            return self.said(index).count(" x cpu, from step ") == starts and bool(found) and "\nstep " in after

        wait_for(ready, f"training on {nodes} nodes", 240)

    def terminate(self, index: int) -> None:
        self._processes[index].terminate()

    def kill(self, index: int) -> None:
        """As when the machine loses power."""
        if self._processes[index].poll() is None:
            for victim in (self._processes[index].pid, *self.ranks(index)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            self._processes[index].wait()

    def __enter__(self) -> Pods:
        return self

    def __exit__(self, *_: object) -> None:
        for index in self._processes:
            self.kill(index)
            print(f"--- {index}\n{self.said(index)[-5000:]}")


def test_a_worker_is_killed_and_the_run_goes_on_when_the_pods_are_made_again(tmp_path: Path) -> None:
    with Pods(
        tmp_path, f"training.num_train_steps={STEPS}", "training.train_batch_size=1", "logging.save_freq=4"
    ) as pods:
        for index in (0, 1):
            pods.start(index)
        wait_for(lambda: len(pods.steps()) >= 9, "step 9", 240)
        os.kill(pods.ranks(1)[-1], signal.SIGKILL)
        for index in (0, 1):
            assert pods.exit_code(index) >= 128, "the operator retries exit codes of 128 and more"
        assert len(pods.steps()) < STEPS
        for index in (0, 1):
            pods.start(index)
        assert [pods.exit_code(index) for index in (0, 1)] == [0, 0]
        assert pods.steps() == list(range(1, STEPS + 1))
        starts = {int(step) for step in re.findall(rf"from step (\d+) to {STEPS}", pods.said(0) + pods.said(1))}
        assert min(starts) == 0 < max(starts), "it went on from a checkpoint"


def test_a_node_joins_and_is_lost(tmp_path: Path) -> None:
    with Pods(
        tmp_path,
        "training.num_train_steps=1000000",
        "training.train_batch_size=2",
        "logging.save_freq=0",
        min_nodes=1,
        max_restarts=9,
    ) as pods:
        pods.start(0)
        pods.trains(0, nodes=1, starts=1)
        pods.start(1)
        pods.trains(0, nodes=2, starts=2)
        assert "stopped (SIGTERM): the same command goes on from here" in pods.said(0), (
            "the rank saved before it was started again"
        )
        assert "2 x cpu, from step 0 " not in pods.said(0)
        pods.kill(1)
        assert pods.exit_code(0) == ExitCode.RETRY
        pods.start(0)
        pods.trains(0, nodes=1, starts=3)
        pods.terminate(0)
        assert pods.exit_code(0) == ExitCode.STOPPED


def test_the_node_of_the_rendezvous_is_lost(tmp_path: Path) -> None:
    """The last lines of the other are ours, and not the stacks of PyTorch's C++ code.

    Its rank notices first, or on a busy machine its torchrun does.
    """
    with Pods(tmp_path, "training.num_train_steps=1000000", "training.train_batch_size=2") as pods:
        for index in (0, 1):
            pods.start(index)
        wait_for(lambda: len(pods.steps()) >= 3, "step 3", 240)
        pods.kill(0)
        assert pods.exit_code(1) == ExitCode.RETRY
        assert "frame #" not in pods.said(1)
        last = pods.said(1).rstrip().splitlines()[-1]
        assert last.startswith(("workers ended first: rank 1 with 134", "the nodes lost each other: "))

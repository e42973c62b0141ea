"""The containers of a job of several nodes as processes of this machine: a node joins, a node is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from schemas import ROOT

from job.errors import ExitCode
from job.launch.kubernetes.manifests import Container, Run, Settings, pytorch_job

pytestmark = pytest.mark.skipif("CYCLEVAE_TEST_K8S" not in os.environ, reason="a minute of processes: `make test-k8s`")
SMALL = "data=synthetic training.device=cpu training.num_train_steps=1000000 training.global_batch_size=4 training.train_batch_size=2 logging.log_freq=5 " \
        "logging.eval_freq=0 logging.save_freq=0 monitoring.enabled=false logging.run_name=r"


class Nodes:
    """The pods of one job, by index."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        run = Run("r", f"{directory}/r", [*SMALL.split(), f"logging.save_dir={directory}"])
        self.job = pytorch_job(run, Settings(nodes=2, min_nodes=1, max_restarts=9, container=Container("image")))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self, index: int) -> None:
        """Start a pod's process with what the operator and Kubernetes would set."""
        (container,) = self.job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        policy = self.job["spec"]["elasticPolicy"]
        told = {"status.podIP": "127.0.0.1", "metadata.labels['training.kubeflow.org/replica-index']": str(index)}
        own = {one["name"]: one["value"] if "value" in one else told[one["valueFrom"]["fieldRef"]["fieldPath"]] for one in container["env"]}
        given = {"PET_RDZV_BACKEND": policy["rdzvBackend"], "PET_RDZV_ID": policy["rdzvId"], "PET_RDZV_ENDPOINT": f"127.0.0.1:{self.port}",
                 "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}", "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
                 "PET_NPROC_PER_NODE": self.job["spec"]["nprocPerNode"], "PET_RDZV_CONF": "last_call_timeout=2"}
        with self.log(index).open("ab") as output:
            self.processes[index] = subprocess.Popen(
                [sys.executable, *container["command"][3:]], stdout=output, stderr=output, start_new_session=True, cwd=self.directory,
                env={**os.environ, "PYTHONPATH": str(ROOT), **own, **given, "OMP_NUM_THREADS": "1"})

    def log(self, index: int) -> Path:
        return self.directory / f"{index}.log"

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 240
        while not ready():
            assert time.monotonic() < end, f"no {what}\n" + "\n".join(path.read_text()[-3000:] for path in self.directory.glob("*.log"))
            time.sleep(0.2)

    def trains(self, index: int, nodes: int, starts: int) -> None:
        """Wait until the node's ranks have been started `starts` times and train, with so many others."""
        def ready() -> bool:
            text = self.log(index).read_text()
            _, found, after = text.rpartition(f", {nodes} x cpu, from step ")
            return text.count(" x cpu, from step ") == starts and bool(found) and "\nstep " in after
        self.wait(ready, f"training on {nodes} nodes")

    def kill(self, index: int) -> None:
        """As when the machine loses power: torchrun and its worker, which has a session of its own."""
        pid = self.processes[index].pid
        for victim in (pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
            os.kill(victim, signal.SIGKILL)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    started = Nodes(tmp_path)
    yield started
    for process in started.processes.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_node_joins_and_is_lost(nodes: Nodes) -> None:
    nodes.start(0)
    nodes.trains(0, nodes=1, starts=1)
    nodes.start(1)
    nodes.trains(0, nodes=2, starts=2)
    log = nodes.log(0).read_text()
    assert "stopped (SIGTERM): the same command goes on from here" in log, "the rank saved before it was started again"
    assert "2 x cpu, from step 0 " not in log
    nodes.kill(1)
    assert nodes.processes[0].wait(240) == ExitCode.RETRY
    nodes.start(0)
    nodes.trains(0, nodes=1, starts=3)
    nodes.processes[0].send_signal(signal.SIGTERM)
    assert nodes.processes[0].wait(240) == ExitCode.STOPPED

"""A node whose torchrun met the attempt before: pods of a job are started again one by one, seconds apart."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks import free_port

WORKER = """
import os, sys, time
from pathlib import Path
from job.command import exit_code_of
from job.runtime import distributed

def main():
    print("up", os.getpid(), flush=True)
    while not Path("go").exists():
        time.sleep(0.02)
    distributed.start("cpu", 60.0)
    distributed.shutdown()

sys.exit(exit_code_of(main))
"""


pytestmark = pytest.mark.slow

# By the kind of torchrun's rendezvous: Kubeflow Trainer uses the first, elastic PyTorchJobs the second.
OPTIONS = {
    "static": ["--node-rank={node}", "--master-addr=127.0.0.1", "--master-port={port}"],
    "c10d": ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=is_host={is_host}"],
}


@contextmanager
def two_nodes(directory: Path, port: int, kind: str) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """Gives what starts the torchrun of a node."""
    there: list[subprocess.Popen[bytes]] = []

    def start(node: int) -> subprocess.Popen[bytes]:
        where = [option.format(node=node, port=port, is_host=node == 0) for option in OPTIONS[kind]]
        command = [sys.executable, "-m", "job.runtime.torchrun", "--nnodes=2", *where, "worker.py"]
        env = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        with (directory / f"node{node}.txt").open("a") as said:
            there.append(
                subprocess.Popen(command, cwd=directory, env=env, stdout=said, stderr=said, start_new_session=True)
            )
        return there[-1]

    try:
        yield start
    finally:
        (directory / "go").touch()  # for workers of a test that failed: they end without their torchrun
        for node in there:
            kill(node)


def kill(node: subprocess.Popen[bytes]) -> None:
    """As the first process of a pod is killed; its workers have sessions of their own."""
    try:
        os.killpg(node.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    node.wait()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def workers(said: Path) -> list[int]:
    """Process ids of the workers that a node has started."""
    return [int(pid) for pid in re.findall(r"^up (\d+)$", said.read_text(), re.MULTILINE)]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_rank_whose_torchrun_met_the_attempt_before_ends_at_once(tmp_path: Path, kind: str) -> None:
    """The store of the new attempt knows no torchrun of its node, for which the other torchrun waits there."""
    (tmp_path / "worker.py").write_text(WORKER)
    port = free_port()
    with two_nodes(tmp_path, port, kind) as start:
        first, second = start(0), start(1)
        wait_for(lambda: workers(tmp_path / "node0.txt") and workers(tmp_path / "node1.txt"))
        kill(first)
        os.kill(workers(tmp_path / "node0.txt")[0], signal.SIGKILL)
        first = start(0)
        wait_for(lambda: listens(port))
        (tmp_path / "go").touch()
        said = tmp_path / "node1.txt"
        assert second.wait(30) == 134, said.read_text()
        second = start(1)
        assert [first.wait(60), second.wait(60)] == [0, 0], said.read_text()

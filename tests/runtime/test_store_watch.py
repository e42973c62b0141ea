"""A rank that waits for others who cannot come."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE

from job.errors import ExitCode

HOST = """
import sys, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""
WAITING = """
import sys, time, torch.distributed as dist
from job.runtime import store_watch
from job.runtime.heartbeat import Heartbeats
store_watch.LOOK_SECONDS, store_watch.SILENT_SECONDS = 0.1, 3.0
store = dist.PrefixStore("signs", dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False))
heartbeats = Heartbeats(store, rank=1, world_size=2, node="here")
signs = lambda: heartbeats.signs([0])
with store_watch.ended_with(signs, within=60):
    time.sleep(0.5)
print("joined", flush=True)
with store_watch.ended_with(signs, within=float(sys.argv[2])):
    print("waiting", flush=True)
    time.sleep(60)
"""


@contextmanager
def waiting(within: float) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """The host of a store, and a rank that waits there."""
    python = [sys.executable, "-c"]
    with (
        subprocess.Popen([*python, HOST], stdin=PIPE, stdout=PIPE, text=True) as host,
        subprocess.Popen([*python, WAITING, _line(host), str(within)], stdout=PIPE, stderr=PIPE, text=True) as rank,
    ):
        try:
            assert _line(rank) == "joined", "as long as the host is there, nothing happens"
            assert _line(rank) == "waiting"
            yield host, rank
        finally:
            host.kill()
            rank.kill()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_it_ends_with_the_meeting_place_to_be_started_again() -> None:
    with waiting(within=60) as (host, rank):
        host.kill()
        _, said = rank.communicate(timeout=30)
    assert rank.returncode == ExitCode.RETRY
    assert "error: the ranks' meeting place has ended" in said


def test_it_ends_where_the_others_do_not_come_to_be_started_again() -> None:
    with waiting(within=1) as (_, rank):
        _, said = rank.communicate(timeout=30)
    assert rank.returncode == ExitCode.RETRY
    assert "error: the other ranks have not joined the run within 1 s" in said


def test_it_ends_where_the_meeting_place_no_longer_answers() -> None:
    """As that of a node without power, whose connections nobody closes."""
    with waiting(within=60) as (host, rank):
        host.send_signal(signal.SIGSTOP)
        _, said = rank.communicate(timeout=30)
    assert rank.returncode == ExitCode.RETRY
    assert "error: the ranks' meeting place has not answered for 3 s" in said

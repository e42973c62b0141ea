"""A rank that waits at a meeting place which has ended."""

from __future__ import annotations

import subprocess
import sys

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
store_watch.LOOK_SECONDS = 0.1
store = dist.PrefixStore("torchelastic", dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False))
with store_watch.ended_with(store):
    time.sleep(0.5)
print("joined", flush=True)
with store_watch.ended_with(store):
    print("waiting", flush=True)
    time.sleep(60)
"""


def test_it_ends_to_be_started_again() -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    port = host.stdout.readline().strip()
    waiting = subprocess.Popen(
        [sys.executable, "-c", WAITING, port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "joined\n", "as long as the host is there, nothing happens"
    assert waiting.stdout.readline() == "waiting\n"
    host.kill()
    _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == ExitCode.RETRY
    assert "error: the ranks' meeting place has ended" in said

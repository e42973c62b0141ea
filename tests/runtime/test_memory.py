"""Memory that a CPU process freed stays with it, unless its user tuned malloc."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

MEGABYTES = 400
FREE = f"""
import ctypes
from job.runtime.memory import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
place = libc.malloc(ctypes.c_size_t({MEGABYTES} << 20))
ctypes.memset(place, 1, {MEGABYTES} << 20)
libc.free(place)
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="malloc here is not glibc's")
@pytest.mark.parametrize(
    ("variables", "is_kept"),
    [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, False)],
)
def test_freed_memory_is_kept(variables: dict[str, str], is_kept: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "LD_PRELOAD"}
    command = [sys.executable, "-c", FREE]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > MEGABYTES * 1024) == is_kept

"""How many threads a rank computes with on CPUs: as many as it has processor cores of its own. It needs no torch.

PyTorch takes every core that it sees. In a container with a quota, or beside other ranks on the machine, these are more
than the rank can have, and its threads then wait for each other: two pods on two cores, each with two threads, trained
at a third of the speed. torchrun takes one, which leaves most cores of a node idle.

So a rank counts the cores on which it may run and divides them by the ranks of its node (`use_own_processors`, before
torch is imported, which reads OMP_NUM_THREADS once). When all ranks have met, those on one machine divide it further
(`share_machine`): pods do not see each other otherwise. A user's own OMP_NUM_THREADS stands.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from typing import Any

from job.runtime.launcher_variables import (
    choose_threads,
    processors_of_slurm_task,
    ranks_of_node,
    threads_are_ours,
)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine
Gather = Callable[[Any], list[Any]]


def cores(processors: Iterable[int], system: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many cores these processors are of: two hyperthreads of one core compute no faster than one."""
    siblings = set()
    for processor in processors:
        try:
            siblings.add((system / f"cpu{processor}/topology/thread_siblings_list").read_text())
        except OSError:  # hidden from this process
            siblings.add(str(processor))
    return len(siblings)


def quota(process: Path = Path("/proc/self"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """Processors' worth of time that the control groups of this process may use; infinite without a limit."""
    lowest = inf
    for line in _text(process / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            places = [mounted]
        elif "cpu" in controllers.split(","):
            places = [mounted / controllers, mounted / "cpu"]
        else:
            continue
        for place in places:
            # In a container the path may be the host's, which is not there: what is mounted is the group itself.
            inner = place / path.lstrip("/")
            groups = [inner, *(parent for parent in inner.parents if parent.is_relative_to(place))]
            lowest = min(lowest, *(_quota_of(group) for group in groups))
    return lowest


def _quota_of(group: Path) -> float:
    limit, _, period = _text(group / "cpu.max").strip().partition(" ")  # version 2
    if not limit:
        limit, period = _text(group / "cpu.cfs_quota_us").strip(), _text(group / "cpu.cfs_period_us").strip()
    if not re.fullmatch(r"\d+", limit) or not int(period or 0):  # max, -1, or no such file
        return inf
    return int(limit) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def own_threads(ranks: int) -> int:
    """Threads for each of `ranks` processes that share the cores which this one may use."""
    here = min(cores(os.sched_getaffinity(0)), quota())
    return max(1, int(here / ranks))


def use_own_processors() -> None:
    """Choose the number of threads of this rank, unless the user or our torchrun has; before torch is imported."""
    of_task = processors_of_slurm_task(os.environ)
    if of_task is None:
        choose_threads(own_threads(ranks_of_node(os.environ)))
    else:
        # SLURM may have bound the task to its cores, so they must not be divided again.
        choose_threads(min(of_task, own_threads(1)))


def share_machine(gather: Gather) -> None:
    """Compute with fewer threads where the ranks of this machine together have more than it has cores.

    All ranks call it; `gather` gives every rank's value.
    """
    import torch

    mine = torch.get_num_threads() if threads_are_ours(os.environ) else 0
    machine = _text(BOOT_ID)
    wanted = sum(threads for other, threads in gather((machine, mine)) if other == machine)
    there = cores(range(os.cpu_count() or 1))
    if mine and wanted > there:
        torch.set_num_threads(max(1, mine * there // wanted))

"""What a container knows of its own end: whether it ran out of memory, or out of room where it may write.

The kernel kills a process that takes more memory than the container may have, and says so to nobody in it: the other
ranks see one that died. The control group counts such kills.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from job.files import json_lines

GROUPS = Path("/sys/fs/cgroup")
# Where a container may write besides its claims, and the setting that makes it larger.
SCRATCH = {"/dev/shm": "hydra.launcher.shm_gb", "/tmp": "the node's disk, or what is written there"}
FULL = 0.99  # share of a file system


@dataclass(frozen=True)
class MemoryGroup:
    """The files of the control group that limits a container's memory."""

    events: Path  # with a line `oom_kill N`
    limit: Path

    @classmethod
    def of_this_container(cls, groups: Path = GROUPS) -> MemoryGroup:
        """Those of version 2, else of version 1."""
        if (groups / "memory.events").exists():
            return cls(groups / "memory.events", groups / "memory.max")
        return cls(groups / "memory" / "memory.oom_control", groups / "memory" / "memory.limit_in_bytes")

    def kills(self) -> int:
        """How many processes the kernel has killed for want of memory, so far; 0 where that is not known."""
        words = (line.split() for line in _text(self.events).splitlines())
        return next((int(number) for name, number in words if name == "oom_kill"), 0)

    def limit_in_words(self) -> str:
        """The container's memory limit."""
        text = _text(self.limit).strip()
        return f"{int(text) / 2**30:.3g}Gi" if text.isdigit() and int(text) < 2**60 else "the node's"


def diagnosis(memory: MemoryGroup, kills_before: int, run_dir: Path) -> str | None:
    """Why this container's processes may have ended without a word of their own; None when nothing speaks for it."""
    if memory.kills() > kills_before:
        return (
            f"out of memory{last_step(run_dir)}: the container came to its limit of {memory.limit_in_words()} and the "
            "kernel killed a process in it; raise hydra.launcher.mem_gb, or lower training.train_batch_size"
        )
    for place, remedy in SCRATCH.items():
        if is_full(place):
            return f"{place} is full{last_step(run_dir)}; raise {remedy}"
    return None


def is_full(place: str) -> bool:
    """Whether a file system has no room left."""
    try:
        room = os.statvfs(place)
    except OSError:
        return False
    return room.f_blocks > 0 and room.f_bavail < (1 - FULL) * room.f_blocks


def last_step(run_dir: Path) -> str:
    """The last step that a run has logged, in words; empty when it has logged none."""
    lines = json_lines(run_dir / "training_log.jsonl")
    return f" after step {lines[-1]['step']}" if lines else ""


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

"""What the ranks of a run print, for `cyclevae slurm logs`."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from job.launch.slurm.run_directory import RunDirectory

POLL_SECONDS = 1.0


def last_lines(log: Path, count: int, rank: int | None) -> tuple[list[str], int]:
    """The last lines of a log, of one rank where that is given; and how many bytes of the log have been read."""
    with log.open("rb") as file:
        lines = deque((line for line in map(_text, file) if is_of(line, rank)), maxlen=count)
        return list(lines), file.tell()


def follow(run: RunDirectory, log: Path, position: int, rank: int | None) -> Iterator[str]:
    """Lines as they are added from `position` on; when the run has got another job, those of its log.

    Ends with a run that has finished or failed: only a new submission could add to it.
    """
    rest, is_over = b"", False
    while True:
        added = b""
        if log.exists():
            with log.open("rb") as file:
                file.seek(position)
                added = file.read()
                position = file.tell()
        *lines, rest = (rest + added).split(b"\n")
        yield from (line for line in map(_text, lines) if is_of(line, rank))
        if not added:
            now = RunDirectory(run.path)  # anew: a RunDirectory keeps what it has read
            if now.log() != log and now.log().exists():
                log, position, rest, is_over = now.log(), 0, b"", False
                continue
            if is_over:
                return
            is_over = now.is_over  # the log is read once more: the batch step prints its last line after it notes this
            time.sleep(POLL_SECONDS)


def is_of(line: str, rank: int | None) -> bool:
    """Whether a line is a rank's, as srun --label marks it (`3: `, or `03: ` where there are more than ten)."""
    return rank is None or re.match(rf" *0*{rank}: ", line) is not None


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\n")

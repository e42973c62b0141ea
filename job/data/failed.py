"""What stops the processes of an array from waiting for one that failed.

torchrun and srun end all processes when one fails. The tasks of an array know nothing of each other: one that fails
says so in DIR/.failed, where the others look while they wait.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from job.errors import UserError
from job.files import write_json

FAILED_FILE = ".failed"


def write(directory: Path, run: str, rank: int, problem: str) -> None:
    """Say that a process of this run has failed, unless another one has said so."""
    if _problem(directory, run) is None:
        with suppress(OSError):  # of a full disk; the task itself fails in any case
            write_json(directory / FAILED_FILE, {"run": run, "rank": rank, "problem": problem})


def forget(directory: Path) -> None:
    """Begin anew: what failed before is tried again."""
    (directory / FAILED_FILE).unlink(missing_ok=True)


def refuse(directory: Path, run: str) -> None:
    """UserError if a process of this run has failed."""
    if problem := _problem(directory, run):
        raise UserError(problem)


def _problem(directory: Path, run: str) -> str | None:
    try:
        failed = json.loads((directory / FAILED_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    if failed.get("run") != run:
        return None
    return f"task {failed['rank']} of the array failed ({failed['problem']}); mend that, and submit the array again"

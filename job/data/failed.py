"""What stops the processes of an array from waiting for one that failed.

torchrun and srun end all processes when one fails. The tasks of an array know nothing of each other: one that fails
says so in DIR/.failed, where the others look while they wait.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from job.errors import UserError
from job.files import write_json

FAILED_FILE = ".failed"

Failure = dict[str, Any]


def write(directory: Path, run: str, rank: int, problem: str) -> None:
    """Say that a process of this run has failed, unless another one has said so."""
    found = read(directory)
    if found is None or found.get("run") != run:
        with suppress(OSError):  # of a full disk; the task itself fails in any case
            write_json(directory / FAILED_FILE, {"run": run, "rank": rank, "problem": problem, "at": time.time()})


def forget(directory: Path) -> None:
    """Begin anew: what failed before is tried again."""
    (directory / FAILED_FILE).unlink(missing_ok=True)


def read(directory: Path) -> Failure | None:
    """What has failed, of whatever run."""
    try:
        return dict(json.loads((directory / FAILED_FILE).read_bytes()))
    except (OSError, ValueError):
        return None


def refuse(directory: Path, run: str, ignored: Failure | None) -> None:
    """UserError if a process of this run has failed, and it is not the failure that is ignored."""
    found = read(directory)
    if found is None or found.get("run") != run or found == ignored:
        return
    raise UserError(
        f"task {found['rank']} of the array failed ({found['problem']}); mend that, and submit the array again"
    )

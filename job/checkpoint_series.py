"""The checkpoints of one run, one after the other, as an evaluation takes them; the run may be training meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from job import checkpoint_names
from job.errors import UserError
from job.runtime.checkpoint import Checkpoint, validate
from job.trained import weights_of


def checkpoints_of(path: Path) -> Path:
    """The directory of a run's checkpoints. UserError for what is no run, and for a run without any checkpoint."""
    directory = path / checkpoint_names.DIRECTORY if (path / checkpoint_names.DIRECTORY).is_dir() else path
    if not checkpoint_names.steps(directory):
        raise UserError(f"{path}: no checkpoints here; --every takes the directory of a run that has saved some")
    return directory


def every_checkpoint(directory: Path, average: bool | None) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Steps and weights of all checkpoints, ascending, those among them that a run adds while this goes on.

    One that the run removes meanwhile, as it keeps the newest only, is passed over: the next one is taken. A damaged
    one is named on standard error. Nothing is locked or written.
    """
    done = -1
    while True:
        ahead = [step for step in checkpoint_names.steps(directory) if step > done]
        if not ahead:
            return
        done = ahead[0]
        path = directory / checkpoint_names.directory_name(done)
        found = validate(path)
        try:
            if isinstance(found, Checkpoint):
                yield done, weights_of(found, average)[0]
                continue
        except OSError:
            if path.exists():
                raise
        if path.exists():
            print(f"note: {path} is left out: {found}", file=sys.stderr)

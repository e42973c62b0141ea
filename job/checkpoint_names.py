"""Names and layout of a run's checkpoints, for programs that look at them without loading torch.

RUN/checkpoints/step_00001234/share_00000_of_00002.safetensors   what one rank wrote
RUN/checkpoints/step_00001234/commit.json                        written last: the checkpoint is complete
RUN/checkpoints/step_00001234.tmp/                               being written, or left by a killed run
"""

from __future__ import annotations

import os
from pathlib import Path

DIRECTORY = "checkpoints"  # below the run directory
COMMIT_FILE = "commit.json"
TEMPORARY = ".tmp"  # suffix of a checkpoint that is being written or removed
_PREFIX = "step_"


def directory_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"{_PREFIX}{step:08d}"


def share_name(rank: int, world_size: int) -> str:
    """Name of the file that holds one rank's share of a checkpoint."""
    return f"share_{rank:05d}_of_{world_size:05d}.safetensors"


def step_of(path: Path) -> int | None:
    """Step of a checkpoint directory, complete or damaged; None for every other name, `step_N.tmp` included."""
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if path.name.startswith(_PREFIX) and digits.isdecimal() else None


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory (RUN/checkpoints), ascending; empty when it does not exist.

    OSError where it cannot be listed. `Path.glob` finds nothing in a directory that it may not read: a run would begin
    anew beside its checkpoints.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (step_of(Path(name)) for name in names)
    return sorted(step for step in found if step is not None)


def unfinished(directory: Path) -> list[Path]:
    """Directories of checkpoints that a killed run was writing or removing."""
    return sorted(directory.glob(f"{_PREFIX}*{TEMPORARY}"))

"""What a run directory holds, finished or not, as a report needs it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from job import checkpoint_names
from job.config import Config, from_dict
from job.errors import UserError
from job.files import json_lines
from job.monitoring.goodput import Goodput

LogLine = dict[str, Any]
PASSES = "passes.jsonl"  # of the run directory: what `python -m job.evaluate RUN --passes ... --json` prints


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk."""

    step: int
    saved: datetime | None  # when it was committed; None for one that is not whole
    size: int  # bytes


@dataclass(frozen=True)
class RunFiles:
    """The files of a run."""

    path: Path
    config: Config
    environment: dict[str, Any]
    training: list[LogLine]
    evaluations: list[LogLine]
    samples: list[LogLine]
    passes: list[LogLine]
    goodput: Goodput
    checkpoints: list[SavedCheckpoint]
    last_sign: datetime | None  # when a log was last written to

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """Steps done, as far as the logs know."""
        lines = [*self.training[-1:], *self.evaluations[-1:]]
        return max((int(line["step"]) for line in lines), default=0)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.config.training.num_train_steps

    @property
    def status(self) -> str:
        """How far the run is, in words."""
        if self.step >= self.total:
            return f"finished: {self.total} steps"
        if self.last_sign is None:
            return "nothing logged yet"
        return f"not finished: {self.step} of {self.total} steps, last log line {when(self.last_sign)}"


def read_run(path: Path) -> RunFiles:
    """The files of a run directory. UserError for a directory of something else."""
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: no config.yaml in it; give the directory of a run, like runs/demo")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path / 'config.yaml'}: cannot be read ({str(error).splitlines()[0]})") from error
    logs = [path / name for name in ("training_log.jsonl", "evaluation.jsonl", "samples.jsonl")]
    written = [log.stat().st_mtime for log in logs if log.exists()]
    return RunFiles(
        path=path,
        config=from_dict(values),
        environment=read_json(path / "environment.json"),
        training=json_lines(logs[0]),
        evaluations=json_lines(logs[1]),
        samples=json_lines(logs[2]),
        passes=json_lines(path / PASSES),
        goodput=Goodput.of(path / "goodput.json"),
        checkpoints=read_checkpoints(path / checkpoint_names.DIRECTORY),
        last_sign=datetime.fromtimestamp(max(written), UTC) if written else None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where the file is missing or damaged, since a report can do without."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        return values
    except (OSError, ValueError):
        return {}


def read_checkpoints(directory: Path) -> list[SavedCheckpoint]:
    """The checkpoints in a directory, by step. One that a running run removes meanwhile is left out."""
    found = []
    for step in checkpoint_names.steps(directory):
        checkpoint = directory / checkpoint_names.directory_name(step)
        try:
            size = sum(file.stat().st_size for file in checkpoint.iterdir())
            commit = checkpoint / checkpoint_names.COMMIT_FILE
            saved = datetime.fromtimestamp(commit.stat().st_mtime, UTC) if commit.exists() else None
        except OSError:
            continue
        found.append(SavedCheckpoint(step, saved, size))
    return found


def when(moment: datetime) -> str:
    """A moment, to the minute."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"

"""Run directories as a comparison reads them, of any launcher, finished or not.

Only files are read that a run writes whole or a line at a time, so a run that is training is not disturbed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from job.config import default_of, keys
from job.errors import UserError
from job.files import by_number, json_lines

CONFIG_FILE, RESULT_FILE = "config.yaml", "result.json"
EVALUATIONS, TRAINING_LOG = "evaluation.jsonl", "training_log.jsonl"
SEED = "training.seed"
# They say which run it is and where it is looked at, not what it computes.
OF_THE_PLACE = {"logging.run_name", "logging.save_dir", "training.resume", "training.allow_changed"}
PLACE_SECTIONS = ("monitoring",)


@dataclass(frozen=True)
class Run:
    """What a comparison knows of a run."""

    path: Path
    settings: Mapping[str, Any]  # every key of its configuration by dotted name
    evaluations: Sequence[Mapping[str, float]]  # in order of steps
    training: Sequence[Mapping[str, float]]  # likewise, of the training log
    finished: bool

    @property
    def seed(self) -> int:
        """training.seed."""
        return int(self.settings[SEED])

    @property
    def steps(self) -> int:
        """Steps that are logged or evaluated."""
        return int(max((line["step"] for line in (*self.training, *self.evaluations)), default=0))

    @property
    def target_steps(self) -> int:
        """training.num_train_steps."""
        return int(self.settings["training.num_train_steps"])

    def evaluated_at(self, step: int | None) -> int | None:
        """The step of the evaluation at `step`, or of the last one; None where there is none."""
        found = [int(line["step"]) for line in self.evaluations if step is None or line["step"] == step]
        return found[-1] if found else None

    def figure(self, key: str, step: int | None) -> float | None:
        """A figure of the evaluation, or else of the training log, at `step` or the last one; None where unknown.

        With `step` a figure of the training log is that of the interval that ended there.
        """
        for lines in (self.evaluations, self.training):
            found = [line[key] for line in lines if key in line and (step is None or line["step"] == step)]
            if found:
                return float(found[-1])
        return None


def find_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs of directories, each of a run or with runs somewhere below, and a line for each that is left out.

    seed=2 comes before seed=10. UserError for a path without any run.
    """
    runs: dict[Path, Run] = {}
    problems = []
    for path in paths:
        directories = sorted(run_directories(path), key=by_number)
        if not directories:
            what = f"no run in it, no directory with a {CONFIG_FILE}" if path.is_dir() else "no such directory"
            raise UserError(f"{path}: {what}; give run directories, or the directory of a sweep")
        for directory in directories:
            try:
                runs.setdefault(directory.resolve(), read_run(directory))
            except UserError as error:
                problems.append(f"left out: {error}")
    return list(runs.values()), problems


def run_directories(path: Path) -> list[Path]:
    """`path` when it is a run's, else the runs' below it; what a run holds is not searched."""
    found = []
    for directory, below, files in os.walk(path):
        if CONFIG_FILE in files and (EVALUATIONS in files or "environment.json" in files):
            found.append(Path(directory))
            below.clear()
        below[:] = [name for name in below if not name.startswith(".")]
    return found


def defaults() -> dict[str, Any]:
    """Every key's default."""
    return {name: default_of(declared) for name, declared in keys().items()}


def read_run(path: Path) -> Run:
    """The run of a directory. UserError for a damaged configuration."""
    if not (path / CONFIG_FILE).exists():
        raise UserError(f"{path}: has not started yet (no {CONFIG_FILE})")
    try:
        values = yaml.safe_load((path / CONFIG_FILE).read_text())
        written = {f"{section}.{name}": value for section, part in values.items() for name, value in part.items()}
        # A run from before a key existed was made by what is the key's default today.
        settings = defaults() | written
        return Run(
            path,
            settings,
            json_lines(path / EVALUATIONS),
            json_lines(path / TRAINING_LOG),
            finished=(path / RESULT_FILE).is_file(),
        )
    except (yaml.YAMLError, AttributeError, TypeError, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path / CONFIG_FILE}: damaged, or not a run's configuration ({reason})") from error


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys in which runs differ, but for the seed and for what only says where a run is, in the keys' order."""
    known = [*keys(), *sorted({name for run in runs for name in run.settings} - set(keys()))]
    compared = [
        name for name in known if name != SEED and name not in OF_THE_PLACE and name.split(".")[0] not in PLACE_SECTIONS
    ]
    return [name for name in compared if len({shown(run.settings.get(name)) for run in runs}) > 1]


def shown(value: Any) -> str:
    """A key's value as it is written on a command line; equal values are written alike."""
    if isinstance(value, str):
        return value
    return json.dumps(value)

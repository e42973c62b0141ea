"""Runs in a file of a line each: small enough to be kept with the code when the runs themselves are gone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from job.comparison.runs import Run
from job.config import default_of, keys
from job.errors import UserError
from job.files import write_text

KEPT = ".jsonl"
DIGITS = 6  # of a figure; the spread over seeds is wider than the last of them


def write_kept(path: Path, runs: Iterable[Run]) -> None:
    """Write runs' settings that are no defaults, and their evaluations."""
    defaults = {name: default_of(declared) for name, declared in keys().items()}
    lines = [
        {
            "run": str(run.path),
            "finished": run.finished,
            "settings": {name: value for name, value in run.settings.items() if value != defaults.get(name)},
            "evaluations": [{key: _short(value) for key, value in line.items()} for line in run.evaluations],
        }
        for run in runs
    ]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def read_kept(path: Path) -> list[Run]:
    """The runs of a file that `write_kept` wrote. UserError for another file."""
    defaults = {name: default_of(declared) for name, declared in keys().items()}
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
        return [
            Run(Path(line["run"]), defaults | line["settings"], line["evaluations"], [], line["finished"])
            for line in lines
        ]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not written by --keep of job.compare ({error})") from error

"""Runs in a file of a line each: small enough to be kept with the code when the runs themselves are gone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from job.comparison.runs import Run, defaults
from job.errors import UserError
from job.files import write_text

KEPT = ".jsonl"
DIGITS = 6  # of a figure; the spread over seeds is wider than the last of them


def write_kept(path: Path, runs: Iterable[Run]) -> None:
    """Write the defaults of today, then a line a run: its settings that are none of them, and its evaluations."""
    of_today = defaults()
    lines: list[dict[str, Any]] = [{"defaults": of_today}]
    lines += [
        {
            "run": str(run.path),
            "finished": run.finished,
            "settings": {name: value for name, value in run.settings.items() if value != of_today.get(name)},
            "evaluations": [{key: _short(value) for key, value in line.items()} for line in run.evaluations],
        }
        for run in runs
    ]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def read_kept(path: Path) -> list[Run]:
    """The runs of a file of `write_kept`, also where defaults have changed since. UserError for another file."""
    try:
        first, *lines = (json.loads(line) for line in path.read_text().splitlines())
        shared = defaults() | first["defaults"]
        return [
            Run(Path(line["run"]), shared | line["settings"], line["evaluations"], [], line["finished"])
            for line in lines
        ]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not written by --keep of job.compare ({error})") from error

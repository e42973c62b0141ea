"""The row of `list` and `status` of every launcher: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from job.metric_names import EVALUATION
from job.tables import aligned

COLUMNS = ("job", "state", "alive", "step", "loss", "rate", "left", "restarts", "run")
HEADLINE = tuple(metric.key for metric in EVALUATION if metric.headline)  # columns where a run has been evaluated


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run; the names are the keys of `--json`. None: not known (yet)."""

    run: str  # its directory
    job: str  # empty without one
    state: str  # RUNNING, FAILED, ...: the launcher's words
    alive: bool  # whether it gave a sign of life of late
    step: int
    steps: int | None  # training.num_train_steps
    loss: float | None
    tokens_per_second: float | None
    seconds_left: int | None
    restarts: int | None
    reason: str | None  # of its state
    log: str  # where its output is
    results: dict[str, float] | None = None  # the last evaluation, as in evaluation.jsonl
    node_hours: float | None = None  # spent so far, over all starts
    lost_ranks: dict[str, int] | None = None  # in how many starts each node has lost ranks
    excluded_nodes: list[str] | None = None  # on which the job will not start again


def show(rows: Sequence[RunStatus], as_json: bool) -> None:
    """Print runs, a line each with what is to be said of it below, or as a JSON list."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    compared = [key for key in HEADLINE if any(key in (row.results or {}) for row in rows)]
    table = [(*COLUMNS[:-1], *compared, COLUMNS[-1])]
    for row in rows:
        *known, run = cells(row)
        results = row.results or {}
        table.append((*known, *(f"{results[key]:.3f}" if key in results else "-" for key in compared), run))
    notes: list[list[str]] = [[], *(notes_of(row) for row in rows)]
    for line, below in zip(aligned(table), notes, strict=True):
        print(line)
        for note in below:
            print(f"    {note}")


def notes_of(row: RunStatus) -> list[str]:
    """What stands below a run's line: why it is in its state, and which nodes did not serve it well."""
    notes = [row.reason] if row.reason else []
    if row.lost_ranks:
        nodes = [f"{node} in {number}" for node, number in row.lost_ranks.items()]
        notes.append(f"starts in which nodes lost ranks: {', '.join(nodes)}")
    if row.excluded_nodes:
        notes.append(f"excluded nodes: {', '.join(row.excluded_nodes)}")
    return notes


def cells(row: RunStatus) -> tuple[str, ...]:
    """A run's cells, in the order of COLUMNS; `-` for what is not known."""
    return (
        row.job or "-",
        row.state,
        "yes" if row.alive else "no",
        f"{row.step}/{row.steps or '?'}",
        f"{row.loss:.4g}" if row.loss is not None else "-",
        f"{row.tokens_per_second:.0f}/s" if row.tokens_per_second else "-",
        clock(row.seconds_left) if row.seconds_left is not None else "-",
        str(row.restarts) if row.restarts is not None else "-",
        row.run,
    )


def clock(seconds: int) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

"""Waiting for the jobs of a sweep, and its summary. The program that waits may end at any time: jobs do not need it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.command import at_the_end
from job.comparison.sweep import show_sweep
from job.errors import JobError

FINISHED = "COMPLETED"  # outcome of a run that did all it should
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Outcome:
    """How the job of a run ended."""

    job: str
    point: str  # the overrides that set the run apart
    state: str  # COMPLETED, FAILED (exit code 1), ...
    failure: str | None  # what went wrong, where something is known of it
    log: str  # where the output is


def leave_jobs_on_signals(command: str) -> None:
    """Let signals end this program and leave the jobs alone; the user is told of `command`, such as cyclevae slurm."""
    farewell = f"the jobs go on without this program: see `{command} list`, end them with `{command} cancel`\n".encode()

    def leave(number: int, _frame: Any) -> None:
        # No cleanup of Python, submitit or Hydra comes in between, which might wait for the jobs or cancel them.
        os.write(2, farewell)
        os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, leave)


def show_changes(points: Mapping[str, str], snapshots: Iterable[Mapping[str, str]]) -> None:
    """Print every change of state of a sweep's jobs until `snapshots` end.

    `points` has a description of each job. Each snapshot has the states of the jobs that have not ended, others among
    them; a launcher stops giving snapshots when all jobs of the sweep are over.
    """
    known: dict[str, str] = {}
    for states in snapshots:
        for job, point in points.items():
            if job in states and states[job] != known.get(job):
                print(f"job {job}: {states[job]}  ({point})", flush=True)
                known[job] = states[job]


ended: list[Outcome] = []  # of the sweep's batches so far (hydra.sweeper.max_batch_size)
waited_for: list[Path] = []  # the run directories of these batches, those that were finished before among them


def summarize(outcomes: Sequence[Outcome], runs: Iterable[Path] = ()) -> None:
    """Print how every run of a batch ended. When one failed, the program's exit code will say so at its end.

    `runs` are the directories that `compare_runs` looks at when all batches are over.
    """
    for outcome in outcomes:
        print(f"job {outcome.job}: {outcome.state}  ({outcome.point})", flush=True)
        if outcome.state != FINISHED:
            print(f"    {outcome.failure or 'no message'}\n    log: {outcome.log}", flush=True)
    ended.extend(outcomes)
    waited_for.extend(runs)
    failed = sum(outcome.state != FINISHED for outcome in ended)
    if failed:
        at_the_end[:] = [
            JobError(
                f"{failed} of {len(ended)} runs did not finish; give the same command again when the cause is mended: "
                "finished ones stay finished"
            )
        ]


def compare_runs() -> None:
    """Print what came of the runs that were waited for, beside each other, where their directories can be read."""
    here = [run for run in waited_for if run.is_dir()]
    if waited_for and not here:  # those of a cluster's pods
        print(f"their directories are not on this machine; where they are: cyclevae compare {waited_for[0].parent}")
    show_sweep(here)

"""hydra/launcher=local: the points of a sweep on this machine, so many at a time, each in a process of its own.

A small model does not keep all cores of a machine busy, and a sweep in one process, which is what --multirun does
without a launcher, trains one point after the other. Every process writes RUN/local.log. The same command again goes on
with all points; a finished one ends at once, saying so.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig

from job.command import at_the_end
from job.errors import ExitCode, StoppedError, UserError
from job.failure_records import VARIABLE, read_failures
from job.launch.failures import end_of_log, first_cause
from job.launch.points import Point, points_of, returns_of
from job.launch.waiting import FINISHED, SIGNALS, Outcome, summarize

POLL_SECONDS = 0.2
LOG, FAILURES = "local.log", "local_failures.jsonl"  # of a run directory


@dataclass
class Running:
    """A point that trains, in one of the places for it."""

    point: Point
    place: int
    process: subprocess.Popen[bytes]


def launch(
    config: DictConfig, context: HydraContext, params: dict[str, Any], job_overrides: Sequence[Sequence[str]]
) -> list[JobReturn]:
    """What hydra/launcher=local does with a batch of points; `params` are the values of hydra.launcher.

    Waits for all of them. A signal is passed on to the points, which save and stop; then no further one is started.
    UserError for what cannot be started, before anything is.
    """
    points = points_of(config, context, job_overrides)
    jobs, gpus = params["jobs"], params["gpus"]
    if jobs < 1:
        raise UserError(f"hydra.launcher.jobs={jobs}: give a number of points that run at a time, at least 1")
    if gpus and len(gpus) != jobs:
        raise UserError(f"hydra.launcher.gpus={gpus}: give one for each of hydra.launcher.jobs={jobs}")
    if params["dry_run"]:
        for point in points:
            print(shlex.join(command(point)))
    else:
        summarize(train(points, jobs, gpus))
    return returns_of(job_overrides, points)


def command(point: Point) -> list[str]:
    """The command that trains a point."""
    return [sys.executable, "-m", "job.train", *point.arguments]


def train(points: Sequence[Point], jobs: int, gpus: Sequence[str]) -> list[Outcome]:
    """Train all points, so many at a time; returns how each ended, in their order."""
    waiting, running = list(points), list[Running]()
    outcomes: dict[Path, Outcome] = {}
    with passed_on(running) as received:
        while running or (waiting and not received):
            while waiting and len(running) < jobs and not received:
                place = min(set(range(jobs)) - {other.place for other in running})
                running.append(started(waiting.pop(0), place, jobs, gpus))
            time.sleep(POLL_SECONDS)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                outcomes[one.point.run_dir] = outcome(one)
                print(f"{outcomes[one.point.run_dir].state}  {one.point.name}", flush=True)
    if received:
        name = signal.Signals(received[0]).name
        at_the_end[:] = [StoppedError(f"stopped by {name}; the same command goes on with all points")]
        return []
    return [outcomes[point.run_dir] for point in points]


def started(point: Point, place: int, jobs: int, gpus: Sequence[str]) -> Running:
    """Start the process of a point."""
    point.run_dir.mkdir(parents=True, exist_ok=True)
    (point.run_dir / FAILURES).unlink(missing_ok=True)  # of an earlier start
    variables = {VARIABLE: str(point.run_dir / FAILURES)}
    # Each point would take all cores, and its threads then wait for those of the others.
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = str(gpus[place])
    with (point.run_dir / LOG).open("ab") as log:
        process = subprocess.Popen(
            command(point),
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Of its own: Ctrl-C would reach it from the terminal and from here, and a second one ends it at once.
            start_new_session=True,
        )
    print(f"started  {point.name}  ({point.run_dir / LOG})", flush=True)
    return Running(point, place, process)


@contextmanager
def passed_on(running: Sequence[Running]) -> Iterator[list[int]]:
    """Pass signals on to the points that train; yields those that came."""
    received: list[int] = []

    def pass_on(number: int, _frame: Any) -> None:
        received.append(number)
        for one in running:
            one.process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome(one: Running) -> Outcome:
    """How a point ended."""
    code, log = one.process.returncode, one.point.run_dir / LOG
    if code == ExitCode.FINISHED:
        return Outcome(str(one.process.pid), one.point.name, FINISHED, None, str(log))
    state = f"killed by {signal.Signals(-code).name}" if code < 0 else f"FAILED (exit code {code})"
    cause = first_cause(read_failures(one.point.run_dir / FAILURES))
    why = str(cause) if cause else end_of_log(log.read_text(errors="replace"))
    return Outcome(str(one.process.pid), one.point.name, state, why, str(log))

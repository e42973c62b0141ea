"""`cyclevae slurm`: submit runs to a SLURM cluster, watch them, end them.

What is known of runs is read from their directories; SLURM's commands tell which jobs are in the queue.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from job.errors import JobError, UserError
from job.launch.command_line import add_log_options, add_outputs, add_submit, add_verb, run
from job.launch.run_status import show
from job.launch.slurm import scheduler
from job.launch.slurm.run_directory import RunDirectory, find_runs, statuses
from job.launch.slurm.scheduler import QueuedJob

CLEAR = "\x1b[H\x1b[2J"  # a terminal's screen


def submit(arguments: list[str], options: argparse.Namespace) -> None:
    """Submit a run or a sweep and return."""
    from job.launch.submission import submit_sweep  # imports Hydra, which the other verbs need not wait for

    submit_sweep("slurm", arguments, options.dry_run, options.json)


def list_runs(options: argparse.Namespace) -> None:
    """Every run below a directory."""
    watched(lambda: show(statuses(find_runs(options.directory), jobs_in_queue()), options.json), options.watch)


def status(options: argparse.Namespace) -> None:
    """Step, loss, rate, time left, restarts of runs."""
    watched(lambda: show(statuses(RunDirectory.chosen(options.runs), jobs_in_queue()), options.json), options.watch)


def watched(showing: Callable[[], None], seconds: float | None) -> None:
    """Show once, or again every so many seconds until Ctrl-C."""
    showing()
    while seconds is not None:
        time.sleep(seconds)
        print(CLEAR if sys.stdout.isatty() else "", flush=True)
        showing()


def wait(options: argparse.Namespace) -> None:
    """Stay until runs have ended and tell how, as the command that submitted them does; Ctrl-C ends no job."""
    from job.launch.slurm.sweep import wait_for_runs

    wait_for_runs(RunDirectory.chosen(options.runs))


def jobs_in_queue() -> dict[str, QueuedJob] | None:
    """Every job in the queue. None without an answer from SLURM, as run directories still tell the rest."""
    try:
        return scheduler.queue() if scheduler.available() else None
    except JobError as error:
        print(f"warning: {error}; states are those of the run directories", file=sys.stderr)
        return None


def logs(options: argparse.Namespace) -> None:
    """What the ranks print."""
    from job.launch.slurm.logs import follow, last_lines

    run = RunDirectory.existing(options.run)
    log, position = run.log(), 0
    if log.exists():
        lines, position = last_lines(log, options.lines, options.rank)
        print("\n".join(lines), flush=True)
    elif not options.follow:
        raise UserError(f"{log} is not there yet: the job has not started (cyclevae slurm status {options.run})")
    if options.follow:
        for line in follow(run, log, position, options.rank):
            print(line, flush=True)


def cancel(options: argparse.Namespace) -> None:
    """End the jobs of runs; they save first and can be resumed."""
    queued = scheduler.queued()
    jobs: list[str] = []
    for name in options.runs:
        if re.fullmatch(r"\d+(_\d+)?", name):
            jobs.append(name)
        else:
            jobs += [run.job for run in RunDirectory.chosen([Path(name)])]
    there = [job for job in jobs if any(job in (entry, entry.split("_")[0]) for entry in queued)]
    for job in there:
        scheduler.output("scancel", job)
        print(f"cancelled job {job}")
    gone = [job or "none" for job in jobs if job not in there]
    if gone and (len(options.runs) == len(jobs) or not there):  # a sweep may have points that are over
        raise UserError(f"not in the queue, so there is nothing to cancel: job {', '.join(gone)}")


def resume(options: argparse.Namespace) -> None:
    """Submit runs again as they were submitted; they go on from their last checkpoint."""
    from job.launch.slurm.resubmission import resubmit

    queued = scheduler.queued()
    runs = [run for path in options.runs for run in resumable(path, queued)]
    jobs = {str(run.path): resubmit(run, queued, dry_run=options.dry_run) for run in runs}
    if options.json:
        print(json.dumps(jobs))
    else:
        print("\n".join(f"job {job}: {run}" for run, job in jobs.items()))


def resumable(path: Path, queued: dict[str, str]) -> list[RunDirectory]:
    """The run of a directory, or those of a sweep that are neither finished nor in the queue.

    A job that was cancelled a moment ago and still saves is no longer counted as in the queue.
    """
    runs = RunDirectory.chosen([path])
    if [run.path for run in runs] == [path]:
        return runs
    ending = scheduler.COMPLETING
    left = [run for run in runs if queued.get(run.job, ending) == ending and not run.is_finished]
    if not left:
        raise UserError(f"{path}: every run is finished or has a job in the queue")
    return left


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="cyclevae slurm", description=__doc__)
    verbs = top.add_subparsers(required=True, metavar="VERB")
    add_submit(verbs, submit, "slurm", "reference/slurm")

    listing = add_verb(verbs, "list", list_runs)
    listing.add_argument("directory", type=Path, nargs="?", default=Path("runs"), help="where to look (default: runs)")
    state = add_verb(verbs, "status", status)
    state.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run or sweep")
    for verb in (listing, state):
        verb.add_argument("--watch", type=float, nargs="?", const=5.0, metavar="SECONDS", help="again and again")
    add_verb(verbs, "wait", wait).add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run or sweep")

    output = add_verb(verbs, "logs", logs)
    output.add_argument("run", type=Path, metavar="RUN")
    add_log_options(
        output, follow="go on as lines are added, into the run's next job too, until the run has finished or failed"
    )
    output.add_argument("--rank", type=int, help="the lines of this rank alone")

    ending = add_verb(verbs, "cancel", cancel)
    ending.add_argument("runs", nargs="+", metavar="RUN", help="run directory or job id")
    add_verb(verbs, "resume", resume).add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")

    add_outputs(verbs, dry_run="print what would be submitted, no more")
    return top


def main(arguments: list[str] | None = None) -> int:
    """`cyclevae slurm VERB ...`."""
    return run(parser(), submit, arguments)


if __name__ == "__main__":
    sys.exit(main())

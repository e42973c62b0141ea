"""`cyclevae slurm`: submit runs to a SLURM cluster, watch them, end them. Everything is read from run directories and SLURM's commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from job.errors import UserError
from job.launch.slurm import scheduler
from job.launch.slurm.run_directory import RunDirectory, find_runs
from job.launch.table import show
from job.launch.verbs import add_outputs, run


def submit(arguments: list[str], options: argparse.Namespace) -> None:
    """Submit a run or a sweep and return."""
    from job.launch.slurm.submission import submit_sweep

    jobs = submit_sweep(arguments, options.dry_run, quiet=options.json)
    if options.json:
        print(json.dumps(jobs))


def listed(options: argparse.Namespace) -> None:
    """Every run below a directory."""
    queued = live()
    show([run.status(queued) for run in find_runs(options.directory)], options.json)


def status(options: argparse.Namespace) -> None:
    """Step, loss, rate, time left, restarts of runs."""
    queued = live()
    show([RunDirectory.existing(path).status(queued) for path in options.runs], options.json)


def live() -> dict[str, str]:
    """Jobs in the queue; without an answer from SLURM, run directories still tell the rest."""
    try:
        return scheduler.queued() if scheduler.available() else {}
    except UserError as error:
        print(f"warning: {error}; states are those of the run directories", file=sys.stderr)
        return {}


def logs(options: argparse.Namespace) -> None:
    """What the ranks print."""
    log = RunDirectory.existing(options.run).log()
    if not log.exists() and not options.follow:
        raise UserError(f"{log} is not there yet: the job has not started (cyclevae slurm status {options.run})")
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", str(options.lines), *(["-F"] if options.follow else []), str(log)])


def cancel(options: argparse.Namespace) -> None:
    """End the jobs of runs; they save first and can be resumed."""
    for name in options.runs:
        job = name if name.replace("_", "").isdigit() else RunDirectory.existing(Path(name)).job
        if not job:
            raise UserError(f"{name} has no job")
        scheduler.output("scancel", job)
        print(f"cancelled job {job}")


def resume(options: argparse.Namespace) -> None:
    """Submit runs again as they were submitted; they go on from their last checkpoint."""
    from job.launch.slurm.submission import resubmit

    queued = scheduler.queued()
    jobs = {str(path): resubmit(RunDirectory.existing(path), queued, dry_run=options.dry_run) for path in options.runs}
    print(json.dumps(jobs) if options.json else "\n".join(f"job {job}: {run}" for run, job in jobs.items()))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="cyclevae slurm", description=__doc__)
    verbs = top.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser(
        "submit",
        help="submit a run or a sweep: the arguments of job.train",
        usage="cyclevae slurm submit [--dry-run] [--json] [--config-name NAME] OVERRIDES...",
        description="The overrides of `python -m job.train`; a list of values is a sweep: "
        "loss.cycle_text_weight=0.05,0.1. hydra.launcher.KEY=VALUE sets what SLURM is asked for (slurm/README.md).",
    )
    verb.set_defaults(function=submit)
    for name, function, runs in (
        ("list", listed, None),
        ("status", status, Path),
        ("logs", logs, None),
        ("cancel", cancel, str),
        ("resume", resume, Path),
    ):
        verb = verbs.add_parser(name, help=function.__doc__)
        verb.set_defaults(function=function)
        if runs is not None:
            verb.add_argument(
                "runs",
                type=runs,
                nargs="+",
                metavar="RUN",
                help="run directory" + (" or job id" if runs is str else ""),
            )
    verbs.choices["list"].add_argument(
        "directory", type=Path, nargs="?", default=Path("runs"), help="where to look (default: runs)"
    )
    verbs.choices["logs"].add_argument("run", type=Path, metavar="RUN")
    verbs.choices["logs"].add_argument("-f", "--follow", action="store_true", help="go on as lines are added")
    verbs.choices["logs"].add_argument("-n", "--lines", type=int, default=50)
    add_outputs(verbs, dry_run="print what would be submitted, no more")
    return top


def main(arguments: list[str] | None = None) -> int:
    """`cyclevae slurm VERB ...`."""
    return run(parser(), submit, arguments)


if __name__ == "__main__":
    sys.exit(main())

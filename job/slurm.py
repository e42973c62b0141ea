"""`cyclevae slurm`: submit runs to a SLURM cluster, watch them, end them. Everything is read from run directories and SLURM's commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from job.command import guarded
from job.errors import UserError
from job.launch import scheduler
from job.launch.rundir import RunDirectory, find_runs
from job.launch.table import show


def submit(arguments: list[str]) -> None:
    """Submit a run or a sweep and return: the arguments of job.train, and --dry-run, --json."""
    from job.launch.submission import submit_sweep

    flags = {"--dry-run", "--json"}
    given = flags.intersection(arguments)
    jobs = submit_sweep([argument for argument in arguments if argument not in flags], dry_run="--dry-run" in given, quiet="--json" in given)
    if "--json" in given:
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
    from job.launch.submission import resubmit

    queued = scheduler.queued()
    jobs = {str(path): resubmit(RunDirectory.existing(path), queued, dry_run=options.dry_run) for path in options.runs}
    print(json.dumps(jobs) if options.json else "\n".join(f"job {job}: {run}" for run, job in jobs.items()))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="cyclevae slurm", description=__doc__)
    verbs = top.add_subparsers(required=True, metavar="VERB")
    verbs.add_parser("submit", help="submit a run or a sweep: the arguments of job.train, and --dry-run, --json", add_help=False)
    for name, function, runs in (("list", listed, None), ("status", status, Path), ("logs", logs, None), ("cancel", cancel, str), ("resume", resume, Path)):
        verb = verbs.add_parser(name, help=function.__doc__)
        verb.set_defaults(function=function)
        if runs is not None:
            verb.add_argument("runs", type=runs, nargs="+", metavar="RUN", help="run directory" + (" or job id" if runs is str else ""))
        if name in ("list", "status", "resume"):
            verb.add_argument("--json", action="store_true", help="for programs")
        if name == "list":
            verb.add_argument("directory", type=Path, nargs="?", default=Path("runs"), help="where to look (default: runs)")
        if name == "logs":
            verb.add_argument("run", type=Path, metavar="RUN")
            verb.add_argument("-f", "--follow", action="store_true", help="go on as lines are added")
            verb.add_argument("-n", "--lines", type=int, default=50)
        if name == "resume":
            verb.add_argument("--dry-run", action="store_true", help="print the command only")
    return top


def main(arguments: list[str] | None = None) -> int:
    """`cyclevae slurm VERB ...`."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["submit"]:
        if {"-h", "--help"}.intersection(given):
            print("cyclevae slurm submit [--dry-run] [--json] [--config-name NAME] OVERRIDES...\n\nThe overrides of `python -m job.train`; a list of "
                  "values is a sweep: loss.cycle_text_weight=0.05,0.1.\nhydra.launcher.KEY=VALUE sets what SLURM is asked for (slurm/README.md).")
            return 0
        return guarded(lambda: submit(given[1:]))
    options = parser().parse_args(given)
    return guarded(lambda: options.function(options))


if __name__ == "__main__":
    sys.exit(main())

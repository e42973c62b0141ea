"""Submitting a run's job script again, for `cyclevae slurm resume`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from job.errors import UserError
from job.files import write_json
from job.launch.slurm import scheduler
from job.launch.slurm.run_directory import RunDirectory


def resubmit(run: RunDirectory, queued: Mapping[str, str], dry_run: bool) -> str:
    """Submit a run's job script again; returns the job's id, or the command if `dry_run`.

    `queued` has the states of the jobs in the queue. UserError when the run has one there, or has no script to submit.
    """
    if queued.get(run.job, scheduler.COMPLETING) != scheduler.COMPLETING:  # one that ends is waited for by the next
        raise UserError(f"{run.path} has job {run.job} in the queue ({queued[run.job]}): nothing to resume")
    if not run.submission:
        raise UserError(f"{run.path} was started by sbatch slurm/train.sbatch: give that command again and it goes on")
    # The command has left out the variables of the job in which it was made, not those of the one we are in now.
    command, index = [*scheduler.without_variables(), *run.submission["again"]], run.submission["index"]
    if not Path(command[-1]).exists():
        raise UserError(f"{command[-1]} is gone: submit the run again with the same command and it goes on")
    if dry_run:
        return shlex.join(command)
    job = scheduler.output(*command).split(";")[0].strip()  # `12;cluster` where there are several clusters
    if index is not None:
        job = f"{job}_{index}"
    write_json(run.submission_file, run.submission | {"job": job, "time": time.time()})
    return job

"""Submitting without waiting: `cyclevae slurm submit` and `resume`."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from job.config import config_dir
from job.errors import UserError
from job.files import write_json
from job.launch.slurm import scheduler, sweep
from job.launch.slurm.run_directory import RunDirectory


@hydra.main(config_path=str(config_dir()), config_name="mmdit_cycle_vae", version_base="1.3")
def _never_called(_values: DictConfig) -> None:
    """The launcher starts job.train by its name, not this function."""


def submit_sweep(arguments: list[str], dry_run: bool, quiet: bool, launcher: str = "slurm") -> list[dict[str, str]]:
    """Submit what the arguments of job.train say, one job per point; returns their jobs and run directories."""
    chosen = (
        [] if any(argument.startswith("hydra/launcher=") for argument in arguments) else [f"hydra/launcher={launcher}"]
    )
    sys.argv = [
        "cyclevae",
        "--multirun",
        *chosen,
        "hydra.launcher.wait=false",
        f"hydra.launcher.dry_run={str(dry_run).lower()}",
        *arguments,
    ]
    before = len(sweep.submitted)
    with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
        _never_called()
    return sweep.submitted[before:]


def resubmit(run: RunDirectory, queued: dict[str, str], dry_run: bool) -> str:
    """Submit a run's job script again; returns the job's id (the command, if dry_run). UserError when the run has a job, or none to repeat."""
    if run.job in queued:
        raise UserError(f"{run.path} has job {run.job} in the queue ({queued[run.job]}): nothing to resume")
    if not run.submission:
        raise UserError(f"{run.path} was started by sbatch slurm/train.sbatch: give that command again and it goes on")
    command, index = run.submission["again"], run.submission["index"]
    if not Path(command[-1]).exists():
        raise UserError(f"{command[-1]} is gone: submit the run again with the same command and it goes on")
    if dry_run:
        return shlex.join(command)
    job = scheduler.output(*command).split(";")[0].strip()
    job = f"{job}_{index}" if index is not None else job
    write_json(run.path / "slurm" / "submission.json", run.submission | {"job": job, "time": time.time()})
    return job

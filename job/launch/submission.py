"""Submitting without waiting, for `cyclevae LAUNCHER submit`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import hydra
from omegaconf import DictConfig

from job.command import overrides_and_options
from job.config import config_dir
from job.errors import UserError
from job.launch import refusal


@dataclass(frozen=True)
class SubmittedJob:
    """A job that this process has submitted, and the run directory of its run."""

    job: str
    run: str


# Hydra gives the caller of hydra.main nothing of what a launcher returns: launchers note their jobs here instead.
submitted: list[SubmittedJob] = []


@hydra.main(config_path=str(config_dir()), config_name="mmdit_cycle_vae", version_base="1.3")
def compose_and_launch(_values: DictConfig) -> None:
    """Have Hydra read sys.argv and call the launcher; never called itself, since launchers name job.train in jobs."""


def submit_sweep(launcher: str, arguments: Sequence[str], dry_run: bool, as_json: bool) -> None:
    """Submit the runs that the arguments of job.train describe, one job per point, and print the jobs.

    `launcher` is the name in configs/hydra/launcher, unless the arguments choose another. With `as_json` stdout has
    nothing but a list of `SubmittedJob`. Hydra reads its command line from sys.argv, composes the points as for
    `python -m job.train --multirun`, and calls the launcher with them.
    """
    overrides, options = overrides_and_options(arguments)
    if any(override.startswith("hydra/launcher=submitit_") for override in overrides):
        raise UserError(refusal.WHY)
    ours = ["hydra.launcher.wait=false", f"hydra.launcher.dry_run={str(dry_run).lower()}"]
    if not any(override.startswith("hydra/launcher=") for override in overrides):
        ours.insert(0, f"hydra/launcher={launcher}")
    sys.argv = ["cyclevae", *ours, *overrides, "--multirun", *options]
    before = len(submitted)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        compose_and_launch()
    if as_json:
        print(json.dumps([asdict(job) for job in submitted[before:]]))

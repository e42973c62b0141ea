"""Submitting without waiting, for `cyclevae LAUNCHER submit`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import hydra
from omegaconf import DictConfig

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
    options, overrides = options_first(arguments)
    if any(override.startswith("hydra/launcher=submitit_") for override in overrides):
        raise UserError(refusal.WHY)
    ours = ["hydra.launcher.wait=false", f"hydra.launcher.dry_run={str(dry_run).lower()}"]
    if not any(override.startswith("hydra/launcher=") for override in overrides):
        ours.insert(0, f"hydra/launcher={launcher}")
    sys.argv = ["cyclevae", "--multirun", *options, *ours, *overrides]
    before = len(submitted)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        compose_and_launch()
    if as_json:
        print(json.dumps([asdict(job) for job in submitted[before:]]))


def options_first(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of job.train as its options that choose a configuration, and the rest.

    Hydra's parser takes all overrides in one piece only. `--config-name demo training.device=cpu` is one, but not with
    our own overrides before it: the option in the middle would make the second piece "unrecognized arguments".
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = ("--config-name", "--config-path", "--config-dir")
    for name, short in zip(names, ("-cn", "-cp", "-cd"), strict=True):
        parser.add_argument(name, short, dest=name)
    chosen, rest = parser.parse_known_args(arguments)
    options = [f"{name}={value}" for name, value in vars(chosen).items() if value is not None]
    return options, rest

"""What does not change while a run trains, for Prometheus: its name, its configuration in a few words, what runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from job.config import MODES, Config, LossConfig
from job.metric_names import LOSS_TERMS, Series
from job.monitoring.environment import environment


class ThisProcess(Protocol):
    """Which process of the run this is, and where it runs."""

    @property
    def rank(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def job_id(self) -> str: ...


def run_label(run_dir: Path, save_dir: Path) -> str:
    """What the label `run` says: the run's directory below save_dir, so that the points of a sweep differ."""
    run_dir, save_dir = run_dir.resolve(), save_dir.resolve()
    return str(run_dir.relative_to(save_dir)) if save_dir in run_dir.parents else run_dir.name


def run_facts(config: Config, process: ThisProcess, dtype: torch.dtype) -> dict[Series, float]:
    """The series of this process that stay as they are. `dtype` is what matrix products are computed in.

    Words go into the labels of a series whose value is 1: Prometheus holds only numbers.
    """
    made = environment(process.device, process.world_size)
    build = (
        made["version"],
        made["git_commit"] or "",
        made["packages"]["torch"],
        made["packages"]["mmdit"],
        made["python"],
        made["built"] or "",
    )
    words = (
        config.loss.loss_type,
        config.model.latent_parameterization,
        config.loss.latent_t_mode,
        config.model.implementation,
        str(dtype).removeprefix("torch."),
        made["gpu"] or "cpu",
        str(process.world_size),
    )
    return {
        ("cyclevae_build_info", build): 1,
        ("cyclevae_config_info", words): 1,
        ("cyclevae_target_steps", ()): config.training.num_train_steps,
        **loss_weights(config.loss),
    }


def loss_weights(config: LossConfig) -> dict[Series, float]:
    """Weights of the terms that a run trains, as the configuration gives them.

    A term whose weight grows has only its target here: its weight as applied is a number of the log.
    """
    modes = MODES if config.loss_type in ("random", "sequential") else (config.loss_type,)
    values: dict[Series, float] = {}
    for term in LOSS_TERMS:
        if not set(modes) & set(term.modes):
            continue
        weight = getattr(config, term.weight) if term.weight else 1.0
        values["cyclevae_loss_weight_target", (term.term,)] = weight
        if term.ramp:
            ramp_end = sum(getattr(config, key) for key in term.ramp)
            values["cyclevae_loss_weight_target_step", (term.term,)] = ramp_end
        else:
            values["cyclevae_loss_weight", (term.term,)] = weight
    return values

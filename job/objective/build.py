"""The objective that a configuration names, with its model."""

from __future__ import annotations

from typing import Protocol

from job.config import Config
from job.errors import UserError
from job.model.build import build_model, vocabulary_size
from job.model.fast import FastMMDiT
from job.objective.objective import Objective


class DataShape(Protocol):
    """What the model must know of the data: `DatasetInfo` has it."""

    vocab_size: int
    latent_dim: int
    mask_token_id: int
    pad_token_id: int


def build_objective(config: Config, data: DataShape) -> Objective:
    """The objective with a freshly initialized model for this data, on the CPU.

    Raises UserError when model.latent_dim or model.vocab_size do not fit the data.
    """
    latent_dim = config.model.latent_dim or data.latent_dim
    if latent_dim != data.latent_dim:
        raise UserError(
            f"model.latent_dim={latent_dim}, but the latents of the data have {data.latent_dim} dimensions; "
            "leave model.latent_dim out"
        )
    model = build_model(config.model, vocabulary_size(config.model, data.vocab_size), latent_dim, config.training.seed)
    if isinstance(model, FastMMDiT):
        model.in_float8 = config.training.fp8
        model.compiled = config.training.compile_model
        model.preparing = config.training.strategy != "fsdp"
        model.recording = config.training.cuda_graphs and config.training.strategy != "fsdp"
        model.checkpointing = config.training.activation_checkpointing
    return Objective(model, config, data.mask_token_id, data.pad_token_id)

"""How a step's samples are divided among ranks and forward passes; launchers ask before anything is sent."""

from __future__ import annotations

from job.config import TrainingConfig
from job.errors import UserError


def batch_sizes(training: TrainingConfig, world_size: int) -> tuple[int, int]:
    """Samples per optimizer step over all ranks, and forward passes per step. UserError when they do not divide."""
    per_pass = training.train_batch_size * world_size
    if training.global_batch_size is None:
        return per_pass * training.gradient_accumulation_steps, training.gradient_accumulation_steps
    if training.global_batch_size % per_pass:
        raise UserError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of training.train_batch_size="
            f"{training.train_batch_size} x {world_size} processes; change one of them; "
            "see docs: how-to/go-on-with-other-ranks"
        )
    return training.global_batch_size, training.global_batch_size // per_pass

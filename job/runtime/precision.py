"""The precision that a run computes in, and whether it computes the same bits every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic

from job.config import TrainingConfig
from job.errors import UserError
from job.runtime.launcher_variables import let_products_repeat

FP8_CAPABILITY = (8, 9)


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """Context of the forward pass: bf16 autocast, or float32. Weights stay float32 in both.

    Raises UserError where bf16 is asked of a GPU that has none.
    """
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bf16" and not has_bf16:
        raise UserError(
            f"training.dtype=bf16: {torch.cuda.get_device_name(device)} has no bf16; use training.dtype=fp32"
        )
    enabled = dtype == "bf16" or (dtype == "auto" and device.type == "cuda" and has_bf16)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in under `autocast`."""
    return torch.bfloat16 if autocast(dtype, device)._enabled else torch.float32


def refuse_without_fp8(training: TrainingConfig, device: torch.device) -> None:
    """Raise UserError where training.fp8 finds no bf16, whose products it replaces, or a GPU without 8-bit floats."""
    if not training.fp8:
        return
    if compute_dtype(training.dtype, device) != torch.bfloat16:
        raise UserError(
            f"training.fp8=true is for bf16, but training.dtype={training.dtype} is float32 on this "
            f"{'GPU' if device.type == 'cuda' else 'CPU'}; set training.dtype=bf16, or leave training.fp8 out"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise UserError(
            f"training.fp8=true: {torch.cuda.get_device_name(device)} has no 8-bit floats, which came with compute "
            "capability 8.9; leave it out"
        )


def set_up(training: TrainingConfig, device: torch.device) -> None:
    """PyTorch's settings for the whole process, before anything is computed on `device`.

    On GPUs that have TF32, products of float32 matrices are computed in it, eight times as fast with 10 bits of
    mantissa; residual streams are kept out of it (job.model.streams). NVIDIA_TF32_OVERRIDE=0 turns it off.

    Raises UserError where the device cannot compute as configured.
    """
    refuse_without_fp8(training, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if training.deterministic:
        let_products_repeat()
        # A warning and no error: an operation that has no such algorithm would otherwise end the run where it first
        # comes up, such as in the samples after the last step.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Which is for finding errors, and writes all memory twice.
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def backward_pass() -> Iterator[None]:
    """Around every `backward()`: in a deterministic run attention's kernels repeat their bits in it.

    They do so only where PyTorch would raise an error for an operation that has no such algorithm; where it would warn,
    they take the faster algorithm, which adds in any order. No operation of a step's backward pass lacks one.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)

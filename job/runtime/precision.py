"""The precision that a run computes in."""

from __future__ import annotations

import torch

from job.errors import UserError


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

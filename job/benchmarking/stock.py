"""What a user puts together from the `mmdit` package: its own blocks with flash attention, compiled."""

from __future__ import annotations

from typing import Any

import torch

from job.errors import UsageError
from job.model.multimodal import MultimodalMMDiT
from job.model.plain import PlainMMDiT

REFERENCE = "lgdlm"  # both heads in every pass, attention maps in memory: what the research code computes
STOCK = "stock"
BASELINES = (REFERENCE, STOCK)


def become(model: MultimodalMMDiT, baseline: str | None) -> None:
    """Turn a plain model into a baseline, in place; None: the research code's. Other models are left alone.

    Raises UsageError for another name, and for a model that is not plain.
    """
    if baseline not in (None, *BASELINES):
        raise UsageError(f"baseline={baseline}: choose one of {', '.join(BASELINES)}")
    if not isinstance(model, PlainMMDiT):
        if baseline:
            raise UsageError(f"baseline={baseline} is of the plain model: add model.implementation=plain")
        return
    model.every_head = baseline != STOCK
    if baseline == STOCK:
        _use_flash_and_compile(model)


def _use_flash_and_compile(model: PlainMMDiT) -> None:
    """What MMDiT(flash_attn=True) builds, and torch.compile for each block.

    The package's attention makes a mask of ones where it is given none, so that a GPU takes SDPA's kernel for masks.
    """
    from x_transformers.attend import Attend

    # The three passes of a step and their recomputations come to more graphs than the 8 that are allowed.
    torch._dynamo.config.recompile_limit = 64
    blocks: Any = model.mmdit.blocks
    for block in blocks:
        block.joint_attn.attend = Attend(flash=True)
        block.compile()

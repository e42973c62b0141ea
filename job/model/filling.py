"""Ragged batches filled up to one of a few sizes, so that few shapes are recorded (graphs.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from job.model.groups import Group, Padding

SIZES = 32  # sizes of ragged batches: a batch is filled up to the next 1/32 of what full rows have


def filled(groups: Sequence[Group], padding: Padding) -> tuple[list[Group], Padding]:
    """The same rows, and where they are ragged one more, which fills the batch up to one of SIZES sizes."""
    if padding.full:
        return list(groups), padding
    rows, seq_len = padding.mask.shape
    tokens = sum(padding.lengths)
    step = min(seq_len, max(1, rows * seq_len // SIZES))
    missing = -(-(tokens + 1) // step) * step - tokens  # at least one, at most `step`, which is no longer than a row
    mask = F.pad(padding.mask, (0, 0, 0, 1))
    mask[-1, :missing] = True
    more = [
        replace(
            group,
            tokens=F.pad(group.tokens, (0, 0, 0, 1)),
            latents=F.pad(group.latents, (0, 0, 0, 1)),
            text_t=_with_one_more(group.text_t, rows),
            latent_t=_with_one_more(group.latent_t, rows),
        )
        for group in groups
    ]
    return more, Padding(mask, False, [*padding.lengths, missing])


def _with_one_more(t: Tensor, rows: int) -> Tensor:
    return torch.cat([t, t[:1]]) if len(t) == rows and rows > 1 else t


def any_lengths(tokens: int, rows: int, seq_len: int) -> list[int]:
    """Lengths of so many tokens in all, the longest as long as any row's can be.

    The host's lengths of a recording: only their sum and their maximum are used, the rest is read from the mask.
    """
    lengths = []
    for left in range(rows - 1, -1, -1):
        length = min(seq_len, tokens - left)
        lengths.append(length)
        tokens -= length
    return lengths

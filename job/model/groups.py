"""What the objective asks of a model: groups of rows, which positions of them count, and what comes back.

A model of either implementation has

    encode(groups, padding) -> Encoded
    logits(text, padding) -> [B, S, V]
    text_loss(text, targets, padding) -> TextLoss

so that the objective is written once. The groups of one `encode` share their rows' lengths, and a head is asked for by
one of them at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """B rows of one pass through the model: a text and a latent each, their timesteps, and the heads that read them.

    Timesteps lie in [0, 1] (0 is clean); they are [B], or [1] where all rows share one, which saves the model work.
    """

    tokens: Tensor  # [B, S] int64
    latents: Tensor  # [B, D]
    text_t: Tensor  # [1] or [B]
    latent_t: Tensor  # [1] or [B]
    heads: tuple[str, ...]  # of "text" and "latent"


class Encoded(NamedTuple):
    """What a model makes of groups: for the group that asks for text, and for the one that asks for a latent."""

    text: Tensor  # in the model's own form, which `logits` and `text_loss` of the same model take
    latent: Tensor  # [B, D], the latent head's predictions; [0, D] when no group asks


@dataclass(frozen=True)
class TextTargets:
    """What a decoded text is compared with, and whether tokens are decoded on the way."""

    tokens: Tensor  # [B, S] int64
    counted: Tensor | None = None  # [B, S] bool: places in the loss; None: all that are computed
    row_weights: Tensor | None = None  # [B]: what every place of a row weighs; None: 1
    pick: bool = False  # decode tokens
    uniform: Tensor | None = None  # [B, S] in [0, 1): draw the tokens at these; None: take the likeliest


class TextLoss(NamedTuple):
    """Cross-entropy of a text, and the tokens decoded on the way."""

    total: Tensor  # scalar float32: the sum over the counted tokens
    tokens: Tensor | None  # [B, S] int64 where they were asked for; anything on positions that are not computed


class Padding:
    """Which positions of B rows of length S are computed.

    Usually the real tokens of `mask` [B, S] alone. With `keep` all of them, as LGDLM does: padding then attends to real
    tokens, but not the other way round.
    """

    def __init__(self, mask: Tensor, keep: bool, lengths: list[int]) -> None:
        """`lengths` are the real tokens of each row.

        They come from the host, since asking the device would wait for it.
        """
        rows, seq_len = mask.shape
        self.mask, self.keep, self.row_lengths = mask, keep, lengths
        self.full = min(lengths) == seq_len
        self.ragged = not self.full and not keep
        self.lengths = lengths if self.ragged else [seq_len] * rows
        # nonzero_static knows its size beforehand; nonzero would wait for the device to tell it.
        self.place = torch.nonzero_static(mask.flatten(), size=sum(lengths))[:, 0] if self.ragged else None

    @property
    def computed(self) -> Tensor:
        """The computed positions [B, S], bool."""
        return torch.ones_like(self.mask) if self.keep else self.mask

    def repeat(self, times: int) -> Padding:
        """The same rows several times, one after the other."""
        return self if times == 1 else Padding(self.mask.repeat(times, 1), self.keep, self.row_lengths * times)

    def pack(self, x: Tensor) -> Tensor:
        """Values [B, S, ...] as those of the T computed tokens alone, [T, ...]."""
        # Not rows[place]: a GPU would sort the places in the backward pass.
        rows = x.flatten(0, 1)
        return rows if self.place is None else rows.index_select(0, self.place)

    def unpack(self, x: Tensor) -> Tensor:
        """Values [T, ...] of the computed tokens as [B, S, ...], 0 elsewhere."""
        rows = x
        if self.place is not None:
            rows = x.new_zeros(self.mask.numel(), *x.shape[1:]).index_copy_(0, self.place, x)
        return rows.unflatten(0, self.mask.shape)

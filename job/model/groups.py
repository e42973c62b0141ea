"""What the fast path asks of a model: rows without their padding, in groups that differ in inputs, timesteps and the heads that read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """B rows of one pass. Timesteps are [B], or [1] where all rows share them; `heads` names what reads the rows."""

    tokens: Tensor  # [B, S] int64
    latents: Tensor  # [B, D]
    text_t: Tensor  # [1] or [B]
    latent_t: Tensor  # [1] or [B]
    heads: tuple[str, ...]


class Padding:
    """Which tokens of B rows of S are computed: the real ones of `mask` [B, S], or all of them (`keep`), which then attend to real ones only.

    `lengths` are the real tokens of each row, on the host.
    """

    def __init__(self, mask: Tensor, keep: bool, lengths: list[int]) -> None:
        self.mask, self.keep, self.row_lengths = mask, keep, lengths
        self.full = min(lengths) == mask.shape[1]
        self.ragged = not self.full and not keep
        self.lengths = lengths if self.ragged else [mask.shape[1]] * len(lengths)
        self.place = torch.nonzero_static(mask.flatten(), size=sum(lengths))[:, 0] if self.ragged else None

    def repeat(self, times: int) -> Padding:
        """The same rows several times, one after the other."""
        return self if times == 1 else Padding(self.mask.repeat(times, 1), self.keep, self.row_lengths * times)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] as the computed tokens [T, ...]."""
        rows = x.flatten(0, 1)
        return rows if self.place is None else rows[self.place]

    def unpack(self, x: Tensor) -> Tensor:
        """Values [T, ...] of computed tokens as [B, S, ...], 0 on others."""
        rows = x if self.place is None else x.new_zeros(self.mask.numel(), *x.shape[1:]).index_copy_(0, self.place, x)
        return rows.unflatten(0, self.mask.shape)

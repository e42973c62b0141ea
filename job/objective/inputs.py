"""What one micro-batch gives to every term of the objective: its rows, its draws, and its share of the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from job.model.groups import Padding
from job.objective.noise import StepNoise
from job.row_kinds import PAIRED, RowKinds

Batch = Mapping[str, Any]  # tensors, but for row_lengths and row_kinds


@dataclass
class Inputs:
    """B texts with their latents, as a part of a global batch of G rows."""

    tokens: Tensor  # [B, S] int64
    mask: Tensor  # [B, S] bool: real tokens
    latent: Tensor  # [B, D] float32
    lengths: Tensor  # [G]: tokens of each row of the global batch
    noise: StepNoise
    keep_padding: bool = False  # compute padding too
    row_lengths: list[int] | None = None  # [B], where the host knows them already
    kinds: RowKinds | None = None  # None: all rows are paired
    kind_of_all: Tensor | None = None  # [G]: kinds of the rows of the global batch
    # Of a part of a micro-batch:
    whole_share: float | None = None  # the micro-batch's part of the global batch; None: these rows are all of it
    row_weight: float = 1.0  # what the mean over these rows is times, see `part`

    @classmethod
    def of(
        cls, batch: Batch, seed: int, step: int, keep_padding: bool = False, noise: StepNoise | None = None
    ) -> Inputs:
        """From a batch: input_ids [B, S], attention_mask [B, S] (True on real tokens) and latent [B, D] or [B, 1, D].

        A part of a global batch also has position [B] (rows in the global batch) and global_lengths [G]. row_lengths, a
        list of B numbers, saves the fast model from asking the device for them. A batch with rows that lack a half has
        row_kinds (RowKinds), its rows in the order of their kinds, and global_kinds [G]. `noise` replaces the step's
        own draws.
        """
        tokens, mask, latent = batch["input_ids"], batch["attention_mask"].bool(), batch["latent"].float()
        position = batch.get("position", torch.arange(tokens.shape[0], device=tokens.device))
        lengths = batch.get("global_lengths", mask.sum(1))
        return cls(
            tokens,
            mask,
            latent[:, 0] if latent.dim() == 3 else latent,
            lengths,
            noise or StepNoise(seed, step, position, lengths.shape[0]),
            keep_padding,
            batch.get("row_lengths"),
            batch.get("row_kinds"),
            batch.get("global_kinds"),
        )

    def has(self, kind: int) -> bool:
        """Whether there are rows of a kind."""
        return kind == PAIRED if self.kinds is None else self.kinds.counts[kind] > 0

    def part(self, kind: int, counted: tuple[int, ...]) -> Inputs:
        """The rows of one kind, for means that run over the rows of the `counted` kinds in the global batch.

        Text losses are divided by `token_count`, which then counts the tokens of these kinds; a mean over rows is to be
        multiplied with `row_weight`. So the sum of the parts' losses, averaged over micro-batches and ranks, is the
        mean over the counted rows of the global batch, however they are divided.
        """
        if self.kinds is None or self.kind_of_all is None:
            return self
        start = sum(self.kinds.counts[:kind])
        rows = slice(start, start + self.kinds.counts[kind])
        is_counted = torch.stack([self.kind_of_all == kind for kind in counted]).any(0)
        counted_rows = sum(self.kinds.counts_of_all[kind] for kind in counted)
        noise = self.noise
        return dataclasses.replace(
            self,
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            latent=self.latent[rows],
            lengths=self.lengths.masked_fill(~is_counted, 0),
            noise=StepNoise(noise.seed, noise.step, noise.position[rows], noise.global_size),
            row_lengths=self.row_lengths[rows] if self.row_lengths else None,
            kinds=None,
            kind_of_all=None,
            whole_share=self.share,
            row_weight=self.kinds.counts[kind] / (counted_rows * self.share),
        )

    @cached_property
    def padding(self) -> Padding:
        """Which tokens are computed."""
        return Padding(self.mask, self.keep_padding, self.row_lengths or self.mask.sum(1).tolist())

    @property
    def share(self) -> float:
        """This micro-batch's part of the global batch."""
        return self.tokens.shape[0] / self.lengths.shape[0] if self.whole_share is None else self.whole_share

    @property
    def token_count(self) -> Tensor | int:
        """This micro-batch's share of the tokens that the text losses count.

        It is the share of the *global* number, not the number of its own tokens: then the mean over ranks and
        micro-batches is the mean over the tokens of the global batch, whatever the number of ranks.
        """
        return self.tokens.numel() if self.keep_padding else self.lengths.sum() * self.share

    def timesteps(self, value: float) -> Tensor:
        """One timestep for every row, [B]."""
        return torch.full((self.tokens.shape[0],), value, dtype=torch.float32, device=self.tokens.device)

"""What one micro-batch gives to every term of the objective: its rows, its draws, and its share of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from job.model.groups import Padding
from job.objective.noise import StepNoise

Batch = Mapping[str, Any]  # tensors, but for row_lengths


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

    @classmethod
    def of(
        cls, batch: Batch, seed: int, step: int, keep_padding: bool = False, noise: StepNoise | None = None
    ) -> Inputs:
        """From a batch: input_ids [B, S], attention_mask [B, S] (True on real tokens) and latent [B, D] or [B, 1, D].

        A part of a global batch also has position [B] (rows in the global batch) and global_lengths [G]. row_lengths, a
        list of B numbers, saves the fast model from asking the device for them. `noise` replaces the step's own draws.
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
        )

    @cached_property
    def padding(self) -> Padding:
        """Which tokens are computed."""
        return Padding(self.mask, self.keep_padding, self.row_lengths or self.mask.sum(1).tolist())

    @property
    def share(self) -> float:
        """This micro-batch's part of the global batch."""
        return self.tokens.shape[0] / self.lengths.shape[0]

    @property
    def token_count(self) -> Tensor | int:
        """This micro-batch's share of the tokens that the text losses count.

        It is the share of the *global* number, not the number of its own tokens: then the mean over ranks and
        micro-batches is the mean over the tokens of the global batch, whatever the number of ranks.
        """
        return self.tokens.numel() if self.keep_padding else self.lengths.sum() * self.share

    def timesteps(self, value: float) -> Tensor:
        """One timestep for every row, [B]."""
        return torch.full((self.tokens.shape[0],), value, device=self.tokens.device)

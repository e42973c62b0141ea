"""Randomness as a function of (seed, step): the draws of a step are made for the global batch, each rank takes its
rows.

So a checkpoint needs no generator state, and another number of ranks with the same global batch sees the same noise.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seed_for(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


class StepNoise:
    """Named, independent draws of one optimizer step.

    `position` [B] is the place of this rank's rows in the global batch of `global_size` samples.
    """

    def __init__(self, seed: int, step: int, position: Tensor, global_size: int) -> None:
        self.seed, self.step, self.position, self.global_size = seed, step, position, global_size

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.position.device).manual_seed(seed_for(name, self.seed, self.step))

    def uniform_of_all(self, name: str, *shape: int) -> Tensor:
        """Uniform draws in [0, 1) for the global batch, [global_size, *shape] float32."""
        generator, device = self._generator(name), self.position.device
        return torch.rand(self.global_size, *shape, generator=generator, dtype=torch.float32, device=device)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """This rank's rows of `uniform_of_all`, [B, *shape]."""
        return self.uniform_of_all(name, *shape)[self.position]

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal draws for this rank's rows, [B, *shape] float32."""
        generator, device = self._generator(name), self.position.device
        of_all = torch.randn(self.global_size, *shape, generator=generator, dtype=torch.float32, device=device)
        return of_all[self.position]


class RowNoise:
    """Named draws for the rows of a batch, each of which depends on the seed and on the row's own number only.

    So what is made of a row is the same in whatever batch it is. `numbers` [B] may repeat: then rows share their draws.
    """

    def __init__(self, seed: int, numbers: Tensor) -> None:
        self.seed, self.numbers = seed, numbers.tolist()

    def _generators(self, name: str) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed_for(name, self.seed, number)) for number in self.numbers]

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform draws in [0, 1), [B, *shape] float32; a longer first dimension of `shape` only adds draws."""
        return torch.stack([torch.rand(*shape, generator=g, dtype=torch.float32) for g in self._generators(name)])

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal draws, [B, *shape] float32."""
        return torch.stack([torch.randn(*shape, generator=g, dtype=torch.float32) for g in self._generators(name)])

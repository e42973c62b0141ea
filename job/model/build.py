"""A freshly initialized model, of the implementation that the configuration names."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from job.config import ModelConfig
from job.errors import UserError
from job.model.fast import FastMMDiT
from job.model.multimodal import MultimodalMMDiT
from job.model.plain import PlainMMDiT

IMPLEMENTATIONS: dict[str, type[MultimodalMMDiT]] = {"fast": FastMMDiT, "plain": PlainMMDiT}


@contextmanager
def _in_float32() -> Iterator[None]:
    """Parameters and buffers are float32 inside, whatever a program that uses the model has set as its default."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeded generators inside, the caller's state untouched outside."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)  # hyper-connections chooses its first stream with Python's random
        try:
            yield
        finally:
            random.setstate(state)


def build_model(config: ModelConfig, vocab_size: int, latent_dim: int, seed: int) -> MultimodalMMDiT:
    """A new model on the CPU, the same for the same seed on every machine and in either implementation."""
    with _in_float32(), _seeded(seed):
        return IMPLEMENTATIONS[config.implementation](config, vocab_size, latent_dim)


def vocabulary_size(config: ModelConfig, data_vocab_size: int) -> int:
    """Rows of the embedding and of the text head: model.vocab_size, or the data's rounded up to model.vocab_multiple.

    Raises UserError when model.vocab_size does not hold the data's token ids.
    """
    if config.vocab_size is None:
        multiples = (data_vocab_size + config.vocab_multiple - 1) // config.vocab_multiple
        return multiples * config.vocab_multiple
    if config.vocab_size < data_vocab_size:
        raise UserError(
            f"model.vocab_size={config.vocab_size} is below the data's vocabulary of {data_vocab_size}; "
            "leave model.vocab_size out"
        )
    return config.vocab_size

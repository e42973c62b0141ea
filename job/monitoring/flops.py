"""What the steps of an interval amount to: tokens, samples, and the operations that the model needs for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from job.config import ModelConfig


def pass_flops(model: ModelConfig, lengths: np.ndarray, vocab_size: int, latent_dim: int) -> dict[str, float]:
    """Floating-point operations of matrix products, forward and backward, of one pass over rows of these token counts [G].

    `t2l` and `l2t` read one head, `joint` both. Counted per modality: text tokens and the one latent of a row go through different
    weights. Work that no head reads (most of the last block) does not count, nor do norms, residual streams and embeddings.
    """
    n, hidden, inner = lengths.astype(np.float64), model.hidden_size, model.n_heads * model.head_dim
    token = 2 * (4 * hidden * inner + 8 * hidden * hidden)  # projections and feed-forward of one token in one block
    keys = 2 * 2 * hidden * inner  # keys and values alone
    attention = 4 * inner * (n + 1)  # of one query over all keys
    modulation = (
        2 * 12 * hidden * model.cond_dim * model.n_blocks
    )  # adaptive norms and gains of a row, 6 H outputs for each modality
    trunk = (model.n_blocks - 1) * (n + 1) * (token + attention) + modulation
    latent_query, text_queries = token + attention, n * (token + attention)
    latent_head, text_head = 2 * (2 * hidden * hidden + 2 * hidden * latent_dim), n * 2 * hidden * vocab_size
    forward = {
        "t2l": trunk + latent_query + n * keys + latent_head,
        "l2t": trunk + text_queries + keys + text_head,
        "joint": trunk + latent_query + text_queries + latent_head + text_head,
    }
    return {name: 3 * float(rows.sum()) for name, rows in forward.items()}  # backward is twice the forward


class Done(NamedTuple):
    """Tokens, samples and operations."""

    tokens: int = 0
    samples: int = 0
    flops: float = 0.0


class Work:
    """What was done since the last read."""

    def __init__(self, model: ModelConfig, vocab_size: int, latent_dim: int) -> None:
        self._model, self._vocab_size, self._latent_dim = model, vocab_size, latent_dim
        self._done = Done()

    def add(self, lengths: np.ndarray, passes: Mapping[str, int]) -> None:
        """One step over the rows of a global batch, with so many passes of each kind."""
        flops = pass_flops(self._model, lengths, self._vocab_size, self._latent_dim)
        tokens, samples, operations = self._done
        self._done = Done(
            tokens + int(lengths.sum()),
            samples + len(lengths),
            operations + sum(count * flops[name] for name, count in passes.items()),
        )

    def read(self) -> Done:
        """What was done, and a new interval."""
        done, self._done = self._done, Done()
        return done

"""What the steps of an interval amount to: tokens, samples, and the operations that the model needs for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from job.config import ModelConfig
from job.row_kinds import LATENT, PAIRED, TEXT

BACKWARD = (
    2  # times the forward: every matrix product has one for the gradient of its input and one for that of its weight
)


def pass_flops(model: ModelConfig, lengths: np.ndarray, vocab_size: int, latent_dim: int) -> dict[str, float]:
    """Operations of matrix products, forward and backward, of one pass over rows of these token counts [G].

    `t2l` and `l2t` read one head, `joint` both. The usual estimate of six operations per parameter and token would be
    three times too high: an MMDiT has weights for each modality, and the one latent of a row goes through half of
    them alone. So operations are counted per modality.

    This is what the model needs, not what an implementation does: work that no head reads (in the last block, all but
    the keys and values of the other modality) does not count, nor do norms, residual streams and embeddings. The
    utilization that follows is the model's in the sense of Chowdhery et al. 2022 (PaLM, appendix B): activations that
    are computed again do not raise it.
    """
    n = lengths.astype(np.float64)  # text tokens of each row; a row's attention is over n + 1, its latent included
    hidden, inner = model.hidden_size, model.n_heads * model.head_dim

    # Of one token (or latent) in one block. A product of [a, b] with a vector takes 2 a b operations.
    projections = 2 * 4 * hidden * inner  # queries, keys, values, output
    feed_forward = 2 * 8 * hidden * hidden  # to 4 H and back
    token = projections + feed_forward
    keys_and_values = 2 * 2 * hidden * inner
    attention = 2 * 2 * inner * (n + 1)  # of one query: its scores over all keys, and their mean of the values

    # Of one row in all blocks: adaptive norms and gains, 6 H outputs for each of two modalities, computed once a row.
    modulation = 2 * 12 * hidden * model.cond_dim * model.n_blocks

    whole_blocks = (model.n_blocks - 1) * (n + 1) * (token + attention) + modulation
    latent_query, text_queries = token + attention, n * (token + attention)  # in the last block
    latent_head = 2 * (2 * hidden * hidden + 2 * hidden * latent_dim)
    text_head = n * 2 * hidden * vocab_size
    forward = {
        "t2l": whole_blocks + latent_query + n * keys_and_values + latent_head,
        "l2t": whole_blocks + text_queries + keys_and_values + text_head,
        "joint": whole_blocks + latent_query + text_queries + latent_head + text_head,
    }
    return {name: (1 + BACKWARD) * float(rows.sum()) for name, rows in forward.items()}


@dataclass(frozen=True)
class Done:
    """Tokens, samples and operations."""

    tokens: int = 0
    samples: int = 0
    flops: float = 0.0
    texts_alone: int = 0  # samples without a latent
    latents_alone: int = 0  # samples without a text


class Work:
    """What was done since the last read."""

    def __init__(self, model: ModelConfig, vocab_size: int, latent_dim: int) -> None:
        self._model, self._vocab_size, self._latent_dim = model, vocab_size, latent_dim
        self._done = Done()

    def add(self, lengths: np.ndarray, passes: Mapping[str, float], kind: int = PAIRED) -> None:
        """One step over the rows of a kind in a global batch, with so many passes of each kind of `pass_flops`."""
        flops = pass_flops(self._model, lengths, self._vocab_size, self._latent_dim)
        self._done = Done(
            tokens=self._done.tokens + int(lengths.sum()),
            samples=self._done.samples + len(lengths),
            flops=self._done.flops + sum(count * flops[name] for name, count in passes.items()),
            texts_alone=self._done.texts_alone + len(lengths) * (kind == TEXT),
            latents_alone=self._done.latents_alone + len(lengths) * (kind == LATENT),
        )

    def read(self) -> Done:
        """What was done, and a new interval."""
        done, self._done = self._done, Done()
        return done

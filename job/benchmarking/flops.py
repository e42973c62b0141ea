"""Operations a step needs, counted per modality: text tokens and the one latent of a row pass different weights, and a head reads only some rows."""

from __future__ import annotations

from job.config import Config


def step_flops(config: Config, lengths: list[int], vocab_size: int, latent_dim: int) -> float:
    """Floating-point operations of matrix products, forward and backward, that one cycle_vae step needs for rows of these token counts.

    Work that no head reads (most of the last block) does not count, nor do norms, residual streams and embeddings.
    """
    m = config.model
    hidden, inner = m.hidden_size, m.n_heads * m.head_dim
    token = 2 * (4 * hidden * inner + 8 * hidden * hidden)  # projections and feed-forward of one token in one block
    keys = 2 * 2 * hidden * inner  # keys and values alone
    modulation = 2 * 12 * hidden * m.cond_dim * m.n_blocks * 2  # adaptive norms and gains, two modalities of 12 H outputs a row
    total = 0.0
    for n in lengths:
        attention = 4 * inner * (n + 1)  # of one query over all keys
        trunk = (m.n_blocks - 1) * (n + 1) * (token + attention) + modulation
        t2l = trunk + token + attention + n * keys + 2 * (2 * hidden * hidden + 2 * hidden * latent_dim)
        l2t = trunk + n * (token + attention) + keys + n * 2 * hidden * vocab_size
        total += t2l * (1 + (config.loss.cycle_latent_weight > 0)) + l2t * (1 + (config.loss.cycle_text_weight > 0))
    return 3 * total

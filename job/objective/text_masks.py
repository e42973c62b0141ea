"""Which tokens of a text are masked in a pass that decodes it (masked diffusion; Sahoo et al. 2024, MDLM).

Fully masked, a text is decoded in one pass: every token is predicted without knowing the others. Decoding in several
passes keeps the surest tokens and predicts the rest given them, which a model has to be trained for on partly masked
texts (loss.text_t_mode=random).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from job.config import LossConfig
from job.objective.inputs import Inputs

SMALLEST_RATIO = 1e-3  # in the weight 1 / ratio, which no single row may dominate without bound


class MaskedText(NamedTuple):
    """The texts of a pass, and how their cross-entropy is counted."""

    tokens: Tensor  # [B, S] int64, the mask token in masked places
    t: Tensor  # [1] or [B]: the text's timestep, which is the share of it that is masked
    counted: Tensor | None  # [B, S] bool: places in the loss; None: all that are computed
    row_weights: Tensor | None  # [B] of a row's places in the loss; None: 1
    denominator: Tensor | int  # of the sum over the places


def fully_masked(s: Inputs, mask_token_id: int) -> MaskedText:
    """Texts without a word; the loss is the mean over the tokens of the global batch."""
    tokens = torch.full_like(s.tokens, mask_token_id)
    return MaskedText(tokens, s.latent.new_ones(1), None, None, s.token_count)


def mask_text(s: Inputs, loss: LossConfig, mask_token_id: int, max_seq_len: int, name: str) -> MaskedText:
    """Texts masked as loss.text_t_mode says; draws are named after `name`.

    With `random` a row's mask ratio is uniform in [0, 1), or 1 with the chance loss.text_full_share. The mean over
    masked tokens weighs rows by how much of them is masked. Weighted by 1 / ratio instead (loss.text_weighting=elbo),
    the loss is, without full rows, an upper bound of -log p of the text, per token (MDLM, eq. 10).
    """
    if loss.text_t_mode == "full" or loss.text_full_share == 1:
        return fully_masked(s, mask_token_id)
    is_full = s.noise.uniform_of_all(f"{name}_full") < loss.text_full_share
    ratio_of_all = torch.where(is_full, 1.0, s.noise.uniform_of_all(f"{name}_t"))
    masked = mask_at(s, ratio_of_all, mask_token_id, max_seq_len, name)
    if loss.text_weighting == "mean":
        return masked
    return masked._replace(row_weights=1 / masked.t.clamp(min=SMALLEST_RATIO), denominator=s.token_count)


def mask_at(s: Inputs, ratio_of_all: Tensor, mask_token_id: int, max_seq_len: int, name: str) -> MaskedText:
    """Texts of which every token is masked with its row's chance, [G] for the global batch.

    The loss is the mean over the masked tokens of the global batch. So their number must be known on every rank, and
    masks are drawn for all rows; for max_seq_len places, so that a batch's padding does not change the draw.
    """
    seq_len = s.tokens.shape[1]
    masked_of_all = s.noise.uniform_of_all(f"{name}_mask", max_seq_len)[:, :seq_len] < ratio_of_all[:, None]
    masked_of_all &= torch.arange(seq_len, device=s.tokens.device) < s.lengths[:, None]
    masked = masked_of_all[s.noise.position]
    count = masked_of_all.sum().clamp(min=1) * s.share
    return MaskedText(torch.where(masked, mask_token_id, s.tokens), ratio_of_all[s.noise.position], masked, None, count)

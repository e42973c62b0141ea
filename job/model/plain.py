"""The plain implementation: stock `mmdit` blocks, one pass for every group, logits of the whole vocabulary.

It is the oracle: slow, and short enough to be compared with the papers and the research code by eye. Tests hold the
fast implementation to its losses and gradients, and `python -m job.benchmark` takes it as the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from job.model.groups import Encoded, Group, Padding, TextLoss, TextTargets
from job.model.multimodal import BOTH_HEADS, MultimodalMMDiT


class PlainMMDiT(MultimodalMMDiT):
    """MultimodalMMDiT by the stock blocks. Its form of a text is the logits [B, S, V]."""

    staged = False
    every_head = False  # compute both heads in every pass, as LGDLM does; the benchmark's baseline

    def encode(self, groups: Sequence[Group], padding: Padding) -> Encoded:
        nothing = torch.empty(0, dtype=torch.float32, device=padding.mask.device)
        encoded = Encoded(nothing, nothing)
        rows = len(padding.mask)
        for group in groups:
            logits, prediction = self(
                group.tokens,
                group.latents,
                group.text_t.expand(rows),
                group.latent_t.expand(rows),
                padding.mask,
                heads=BOTH_HEADS if self.every_head else group.heads,
            )
            if "text" in group.heads:
                encoded = encoded._replace(text=logits)
            if "latent" in group.heads:
                encoded = encoded._replace(latent=prediction)
        return encoded

    def logits(self, text: Tensor, padding: Padding) -> Tensor:
        return text

    def text_loss(self, text: Tensor, targets: TextTargets, padding: Padding) -> TextLoss:
        losses = F.cross_entropy(text.flatten(0, 1).float(), targets.tokens.flatten(), reduction="none")
        counted = padding.computed if targets.counted is None else targets.counted
        losses = losses * counted.flatten()
        if targets.row_weights is not None:
            losses = losses * targets.row_weights[:, None].expand_as(counted).flatten()
        tokens = pseudo_tokens(text.detach(), targets.uniform) if targets.pick else None
        return TextLoss(losses.sum(), tokens)


def pseudo_tokens(logits: Tensor, uniform: Tensor | None) -> Tensor:
    """Tokens [B, S] of logits [B, S, V]: the likeliest, or drawn at `uniform` [B, S] in [0, 1).

    A draw inverts the distribution function. So it depends on its uniform number, which is a function of (seed, step),
    and not on a generator's state.
    """
    if uniform is None:
        return logits.argmax(-1)
    distribution = logits.float().softmax(-1).cumsum(-1)
    place = uniform[..., None] * distribution[..., -1:]  # rounding leaves the last sum a little beside 1
    return torch.searchsorted(distribution, place).squeeze(-1).clamp(max=logits.shape[-1] - 1)

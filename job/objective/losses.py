"""The two distances of the objective, and its weights over time."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def text_cross_entropy(logits: Tensor, targets: Tensor, counted: Tensor, count: Tensor | float) -> Tensor:
    """Sum of the cross-entropy of logits [B, S, V] to targets [B, S] over the positions `counted` [B, S] (bool), divided by `count`.

    `count` is this rank's share of the global number of counted tokens, so that the mean over ranks is the global token mean.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (losses * counted.flatten()).sum() / count


def latent_loss(prediction: Tensor, target: Tensor, normalize: bool) -> Tensor:
    """Mean squared error of predictions [B, D] to targets [B, D]; `normalize` compares unit vectors, as LGDLM does."""
    prediction, target = prediction.float(), target.float()
    if normalize:
        prediction, target = F.normalize(prediction, dim=-1), F.normalize(target, dim=-1)
    return F.mse_loss(prediction, target)


def ramp(step: int, weight: float, warmup_steps: int, ramp_steps: int) -> float:
    """Weight at a step: 0 before `warmup_steps`, then linear over `ramp_steps` up to `weight`."""
    if step < warmup_steps:
        return 0.0
    return weight * min(1.0, (step - warmup_steps) / ramp_steps) if ramp_steps else weight

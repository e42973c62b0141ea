"""The latent's distance, and the weights of the cycle terms over time."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def latent_loss(prediction: Tensor, target: Tensor, normalize: bool) -> Tensor:
    """Mean squared error of predictions [B, D] to targets [B, D].

    `normalize` compares unit vectors, as LGDLM does, which trains the direction only.
    """
    prediction, target = prediction.float(), target.float()
    if normalize:
        prediction, target = F.normalize(prediction, dim=-1), F.normalize(target, dim=-1)
    return F.mse_loss(prediction, target)


def ramp(step: int, weight: float, warmup_steps: int, ramp_steps: int) -> float:
    """Weight at a step: 0 before `warmup_steps`, then linear over `ramp_steps` up to `weight`."""
    if step < warmup_steps:
        return 0.0
    if ramp_steps == 0:
        return weight
    return weight * min(1.0, (step - warmup_steps) / ramp_steps)

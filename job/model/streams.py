"""Residual streams (manifold-constrained hyper-connections, Xie et al. 2025) with the weights of the `hyper-connections` package.

A branch reads one mixture of the s streams; its output is written to all of them while a doubly stochastic matrix mixes them.
Norm and projections are one product, and mixing waits for the write, so that nothing of the size of the streams is kept between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Mixing(NamedTuple):
    """Weights of one sublayer, float32, for N tokens and s streams."""

    mix: Tensor  # [N, s, s]: to stream, from stream
    post: Tensor  # [N, s, 1]: branch output to streams


def sinkhorn(logits: Tensor, general: Any) -> Tensor:
    """Doubly stochastic [N, s, s] from logits [N, s, s]; two streams have a closed form, others iterate by `general`."""
    if logits.shape[-1] != 2:
        return general(logits)
    p = ((logits[:, 0, 0] + logits[:, 1, 1] - logits[:, 0, 1] - logits[:, 1, 0]) / 2).sigmoid()
    return torch.stack([p, 1 - p, 1 - p, p], dim=-1).unflatten(-1, (2, 2))


def read(connection: Any, streams: Tensor) -> tuple[Tensor, Mixing | None]:
    """Branch input [N, H] of streams [N, s, H] float32, and the weights for `write` (None for a single stream)."""
    if streams.shape[1] == 1:
        return streams[:, 0], None
    c = connection
    with torch.autocast(streams.device.type, enabled=False):
        scales = torch.cat([c.pre_branch_scale, c.residual_scale.expand(c.num_residual_streams), c.h_post_scale[None]])
        weight = torch.cat([c.dynamic_alpha_fn[0], c.dynamic_beta_fn], dim=-1) * scales * ((c.norm.gamma + 1) * c.norm.scale)[:, None]
        length = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).clamp(min=1e-12)
        logits = streams @ weight / length + torch.cat([c.static_alpha, c.static_beta[:, 0]], dim=-1)
        branch = torch.bmm(logits[..., 0].sigmoid()[:, None], streams)[:, 0]
    return branch, Mixing(sinkhorn(logits[..., 1:-1], c.residual_mix_constraint_fn).mT, 2 * logits[..., -1:].sigmoid())


def write(streams: Tensor, weights: Mixing | None, branch: Tensor) -> Tensor:
    """Mixed streams [N, s, H] plus the branch output [N, H]."""
    if weights is None:
        return streams + branch[:, None]
    with torch.autocast(streams.device.type, enabled=False):
        return torch.baddbmm(weights.post * branch.float()[:, None], weights.mix, streams)

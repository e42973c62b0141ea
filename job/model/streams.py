"""Residual streams (manifold-constrained hyper-connections, Xie et al. 2025) with the weights of the `hyper-connections` package.

A branch reads one mixture of the s streams; its output is written to all of them while a doubly stochastic matrix mixes them.
Norm and projections are one product, mixing waits for the write, and the gradients are written out: autograd's take twice the passes.
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


class _Read(torch.autograd.Function):
    """Unnormalized weights of a sublayer, streams @ weight / |streams| + bias, and the mixture of streams that their first column gives."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        inverse = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).clamp_(min=1e-12).reciprocal_()
        projected = (streams.flatten(0, 1) @ weight).view(*streams.shape[:2], -1).mul_(inverse)
        logits = projected + bias
        alphas = logits[..., 0].sigmoid()
        ctx.save_for_backward(streams, weight, inverse, projected, alphas)
        return torch.bmm(alphas[:, None], streams)[:, 0], logits

    @staticmethod
    def backward(ctx: Any, to_branch: Tensor, to_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        streams, weight, inverse, projected, alphas = ctx.saved_tensors
        to_alphas = torch.bmm(streams, to_branch[:, :, None])[..., 0]
        to_logits = to_logits.clone()
        to_logits[..., 0] += to_alphas * alphas * (1 - alphas)
        along = (to_logits * projected).sum(-1, keepdim=True).mul_(inverse).mul_(inverse)
        to_projected = (to_logits * inverse).flatten(0, 1)
        to_streams = (to_projected @ weight.T).view_as(streams).baddbmm_(alphas[..., None], to_branch[:, None])
        return to_streams.addcmul_(streams, along, value=-1), streams.flatten(0, 1).T @ to_projected, to_logits.sum(0)


class _Write(torch.autograd.Function):
    """mix @ streams + post * branch, whose gradients are small matrix products: nothing of the size of the streams is made on the way."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, mix: Tensor, post: Tensor, branch: Tensor) -> Tensor:
        ctx.save_for_backward(streams, mix, post, branch)
        return torch.bmm(mix, streams).addcmul_(post, branch[:, None])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        streams, mix, post, branch = ctx.saved_tensors
        gradient = gradient.contiguous()  # the last block's is a sum's, expanded, which bmm would take matrix by matrix
        return (
            torch.bmm(mix.mT, gradient),
            torch.bmm(gradient, streams.mT),
            torch.bmm(gradient, branch[:, :, None]),
            torch.bmm(post.mT, gradient)[:, 0],
        )


def read(connection: Any, streams: Tensor) -> tuple[Tensor, Mixing | None]:
    """Branch input [N, H] of streams [N, s, H] float32, and the weights for `write` (None for a single stream)."""
    if streams.shape[1] == 1:
        return streams[:, 0], None
    c = connection
    with torch.autocast(streams.device.type, enabled=False):
        scales = torch.cat([c.pre_branch_scale, c.residual_scale.expand(c.num_residual_streams), c.h_post_scale[None]])
        weight = (
            torch.cat([c.dynamic_alpha_fn[0], c.dynamic_beta_fn], dim=-1)
            * scales
            * ((c.norm.gamma + 1) * c.norm.scale)[:, None]
        )
        branch, logits = _Read.apply(streams, weight, torch.cat([c.static_alpha, c.static_beta[:, 0]], dim=-1))
    return branch, Mixing(sinkhorn(logits[..., 1:-1], c.residual_mix_constraint_fn).mT, 2 * logits[..., -1:].sigmoid())


def write(streams: Tensor, weights: Mixing | None, branch: Tensor) -> Tensor:
    """Mixed streams [N, s, H] plus the branch output [N, H]."""
    if weights is None:
        return streams + branch[:, None]
    with torch.autocast(streams.device.type, enabled=False):
        return _Write.apply(streams, weights.mix, weights.post, branch.float())

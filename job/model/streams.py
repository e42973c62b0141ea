"""Residual streams (manifold-constrained hyper-connections, Xie et al. 2025) with the weights of `hyper-connections`.

There are s streams of width H instead of one. Before a sublayer's branch (attention or feed-forward), weights follow
from the streams themselves: the branch reads one mixture of the streams (`alphas`), its output is added to each
(`post`), and the streams are mixed among themselves by a doubly stochastic matrix (`mix`), which keeps their sum.

With the stock module a step of 24 blocks takes about 274,000 operations with two streams, against 16,700 with one. Here
norm and projections of a sublayer are one product, and mixing waits until the branch is written, so that the streams,
which are the largest tensors of the model, are read and written once. It is written in two ways:

- Run as they are, `_Read` and `_Write` use small matrix products and written-out gradients; autograd's take twice the
  passes over the streams.
- For a compiler it is elementwise arithmetic and sums over two streams, which become one loop forward and one backward:
  products of 2x2 matrices it would leave to a library, one call and one pass over the streams each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Mixing(NamedTuple):
    """Weights of one sublayer by which its streams are written, float32, for N tokens and s streams."""

    mix: Tensor  # [N, s, s]: to stream, from stream
    post: Tensor  # [N, s, 1]: branch output to streams


def read(connection: Any, streams: Tensor) -> tuple[Tensor, Mixing | None]:
    """Branch input [N, H] of streams [N, s, H] float32, and the weights for `write` (None for a single stream)."""
    if streams.shape[1] == 1:
        return streams[:, 0], None
    c = connection
    with torch.autocast(streams.device.type, enabled=False):
        # One matrix [H, 1 + s + 1] gives alpha, mixing logits and post weights, norm gain and scales included.
        scales = torch.cat([c.pre_branch_scale, c.residual_scale.expand(c.num_residual_streams), c.h_post_scale[None]])
        gain = (c.norm.gamma + 1) * c.norm.scale
        weight = torch.cat([c.dynamic_alpha_fn[0], c.dynamic_beta_fn], dim=-1) * scales * gain[:, None]
        bias = torch.cat([c.static_alpha, c.static_beta[:, 0]], dim=-1)
        if torch.compiler.is_compiling():
            branch, logits = _read_elementwise(streams, weight, bias)
        else:
            branch, logits = _Read.apply(streams, weight, bias)
    mix = sinkhorn(logits[..., 1:-1], c.residual_mix_constraint_fn).mT
    post = 2 * logits[..., -1:].sigmoid()
    return branch, Mixing(mix, post)


def write(streams: Tensor, mixing: Mixing | None, branch: Tensor) -> Tensor:
    """Mixed streams [N, s, H] plus the branch output [N, H]."""
    if mixing is None:
        return streams + branch[:, None]
    with torch.autocast(streams.device.type, enabled=False):
        arguments = (streams, mixing.mix, mixing.post, branch.float())
        return _write_elementwise(*arguments) if torch.compiler.is_compiling() else _Write.apply(*arguments)


def sinkhorn(logits: Tensor, general: Any) -> Tensor:
    """Doubly stochastic matrices [N, s, s] from logits [N, s, s].

    Sinkhorn's iteration alternates between rows and columns; for two streams its limit has a closed form, [[p, 1-p],
    [1-p, p]] with p = sigmoid((a00 + a11 - a01 - a10) / 2). More streams iterate by `general`, the stock module's
    function.
    """
    if logits.shape[-1] != 2:
        return general(logits)
    p = ((logits[:, 0, 0] + logits[:, 1, 1] - logits[:, 0, 1] - logits[:, 1, 0]) / 2).sigmoid()
    return torch.stack([p, 1 - p, 1 - p, p], dim=-1).unflatten(-1, (2, 2))


def _read_elementwise(streams: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What _Read computes."""
    inverse = streams.square().sum(-1, keepdim=True).clamp(min=1e-24).rsqrt()
    projected = (streams.flatten(0, 1) @ weight).view(*streams.shape[:2], -1) * inverse
    logits = projected + bias
    return (logits[..., :1].sigmoid() * streams).sum(1), logits


def _write_elementwise(streams: Tensor, mix: Tensor, post: Tensor, branch: Tensor) -> Tensor:
    """What _Write computes."""
    return (mix[..., None] * streams[:, None]).sum(2) + post * branch[:, None]


@contextmanager
def whole_float32() -> Iterator[None]:
    """Products of float32 matrices without TF32, whatever the run's setting.

    The streams go through such a product in every sublayer. Rounded to TF32's 10 bits of mantissa each time, they would
    lose more than a run in bf16 does, whose streams stay float32.
    """
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = before


class _Read(torch.autograd.Function):
    """The sublayer's logits, streams @ weight / |streams| + bias, and the mixture that their first column gives."""

    @staticmethod
    @whole_float32()
    def forward(ctx: Any, streams: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        inverse = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).clamp_(min=1e-12).reciprocal_()
        # Norm after the product, where there are s + 2 columns to scale and not H.
        projected = (streams.flatten(0, 1) @ weight).view(*streams.shape[:2], -1).mul_(inverse)
        logits = projected + bias
        alphas = logits[..., 0].sigmoid()
        ctx.save_for_backward(streams, weight, inverse, projected, alphas)
        return torch.bmm(alphas[:, None], streams)[:, 0], logits

    @staticmethod
    @whole_float32()
    def backward(ctx: Any, to_branch: Tensor, to_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        streams, weight, inverse, projected, alphas = ctx.saved_tensors
        to_alphas = torch.bmm(streams, to_branch[:, :, None])[..., 0]
        to_logits = to_logits.clone()
        to_logits[..., 0] += to_alphas * alphas * (1 - alphas)
        # The norm takes away the part of the gradient that lies along the streams.
        along = (to_logits * projected).sum(-1, keepdim=True).mul_(inverse).mul_(inverse)
        to_projected = (to_logits * inverse).flatten(0, 1)
        to_streams = (to_projected @ weight.T).view_as(streams)
        to_streams = to_streams.baddbmm_(alphas[..., None], to_branch[:, None]).addcmul_(streams, along, value=-1)
        return to_streams, streams.flatten(0, 1).T @ to_projected, to_logits.sum(0)


class _Write(torch.autograd.Function):
    """mix @ streams + post * branch.

    Its gradients are small matrix products: nothing else of the streams' size is made.
    """

    @staticmethod
    @whole_float32()
    def forward(ctx: Any, streams: Tensor, mix: Tensor, post: Tensor, branch: Tensor) -> Tensor:
        ctx.save_for_backward(streams, mix, post, branch)
        return torch.bmm(mix, streams).addcmul_(post, branch[:, None])

    @staticmethod
    @whole_float32()
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        streams, mix, post, branch = ctx.saved_tensors
        # After the last block the gradient is a sum's, expanded over the streams, and bmm would take it matrix by
        # matrix.
        gradient = gradient.contiguous()
        to_streams = torch.bmm(mix.mT, gradient)
        to_mix = torch.bmm(gradient, streams.mT)
        to_post = torch.bmm(gradient, branch[:, :, None])
        to_branch = torch.bmm(post.mT, gradient)[:, 0]
        return to_streams, to_mix, to_post, to_branch

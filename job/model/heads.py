"""Attention's queries, keys and values in one pass over memory, by Triton kernels on a GPU.

From the products of texts and of latents with their weights follow heads whose queries and keys are normed, and rows
that lie end to end, each row's latent behind its text: norms, copies and concatenations in one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from job.model.end_to_end import EndToEnd
from job.model.sublayer import ceil_div

HEAD_ROWS = 32  # rows of a tile


def join_heads(
    text: Tensor, latent: Tensor, text_gains: Tensor | None, latent_gains: Tensor | None, at: EndToEnd, n_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [T + R, h, d] of texts and latents, each row's latent behind its text.

    text and latent are [T, 3hd] and [R, 3hd]; queries and keys are brought to length 1 and multiplied with gains [2, h,
    d] float32 if there are any (MultiHeadRMSNorm of the stock blocks). `at` has their places, text_at [T] and
    latent_at [R].
    """
    return _JoinHeads.apply(text, latent, text_gains, latent_gains, at.text_at, at.latent_at, n_heads)


def heads_of(qkv: Tensor, gains: Tensor | None, n_heads: int) -> list[Tensor]:
    """Queries, keys and values [N, h, d], queries and keys normed, of qkv [N, 3hd]."""
    heads = qkv.new_empty(3, len(qkv), n_heads, qkv.shape[1] // (3 * n_heads))
    _forward(qkv, gains, None, heads)
    return list(heads.unbind())


def heads_backward_of(
    to_heads: Tensor, qkv: Tensor, gains: Tensor | None, n_heads: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of qkv and of gains for those [3, N, h, d] of what `heads_of` gives."""
    to_q, to_k, to_v = to_heads
    return _backward(to_q, to_k, to_v, qkv, gains, None)


class _JoinHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        text: Tensor,
        latent: Tensor,
        text_gains: Tensor | None,
        latent_gains: Tensor | None,
        text_at: Tensor,
        latent_at: Tensor,
        n_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        joined = text.new_empty(3, len(text) + len(latent), n_heads, text.shape[1] // (3 * n_heads))
        for qkv, gains, at in ((text, text_gains, text_at), (latent, latent_gains, latent_at)):
            _forward(qkv, gains, at, joined)
        ctx.save_for_backward(text, latent, text_gains, latent_gains, text_at, latent_at)
        return joined[0], joined[1], joined[2]

    @staticmethod
    def backward(ctx: Any, to_q: Tensor, to_k: Tensor, to_v: Tensor) -> tuple[Tensor | None, ...]:
        text, latent, text_gains, latent_gains, text_at, latent_at = ctx.saved_tensors
        to_heads = (to_q.contiguous(), to_k.contiguous(), to_v.contiguous())
        to_text, to_text_gains = _backward(*to_heads, text, text_gains, text_at)
        to_latent, to_latent_gains = _backward(*to_heads, latent, latent_gains, latent_at)
        return to_text, to_latent, to_text_gains, to_latent_gains, None, None, None


def _forward(qkv: Tensor, gains: Tensor | None, at: Tensor | None, heads: Tensor) -> None:
    """Heads of qkv [N, 3hd] to `heads` [3, M, h, d], at the places `at` [N] if not as they lie."""
    from job.model.head_kernels import heads_forward

    n_heads, size = heads.shape[2:]
    if len(qkv):
        heads_forward[(ceil_div(len(qkv), HEAD_ROWS), n_heads)](
            qkv, gains, at, *heads, len(qkv), n_heads, **_head_shape(size), NORM=gains is not None
        )


def _backward(
    to_q: Tensor, to_k: Tensor, to_v: Tensor, qkv: Tensor, gains: Tensor | None, at: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of qkv [N, 3hd] and of gains [2, h, d] for those [M, h, d] of heads at the places `at`."""
    from job.model.head_kernels import heads_backward

    n_heads, size = to_q.shape[1:]
    tiles = ceil_div(len(qkv), HEAD_ROWS)
    to_qkv = torch.empty_like(qkv)
    parts = None if gains is None else gains.new_empty(tiles, 2, n_heads, size)
    if tiles:
        heads_backward[(tiles, n_heads)](
            *(to_q, to_k, to_v, qkv, gains, at, to_qkv, parts, len(qkv), n_heads),
            **_head_shape(size),
            NORM=gains is not None,
        )
    return to_qkv, None if parts is None else parts.sum(0)


def _head_shape(size: int) -> dict[str, int]:
    return {"D": size, "COLUMNS": 1 << (size - 1).bit_length(), "ROWS": HEAD_ROWS, "num_warps": 4}

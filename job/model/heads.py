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
        from job.model.head_kernels import heads_forward

        width = text.shape[1] // 3
        joined = text.new_empty(3, len(text) + len(latent), n_heads, width // n_heads)
        for qkv, gains, at in ((text, text_gains, text_at), (latent, latent_gains, latent_at)):
            if len(qkv):
                heads_forward[(ceil_div(len(qkv), HEAD_ROWS), n_heads)](
                    qkv, gains, at, *joined, len(qkv), n_heads, **_head_shape(width // n_heads), NORM=gains is not None
                )
        ctx.save_for_backward(text, latent, text_gains, latent_gains, text_at, latent_at)
        return joined[0], joined[1], joined[2]

    @staticmethod
    def backward(ctx: Any, to_q: Tensor, to_k: Tensor, to_v: Tensor) -> tuple[Tensor | None, ...]:
        from job.model.head_kernels import heads_backward

        text, latent, text_gains, latent_gains, text_at, latent_at = ctx.saved_tensors
        n_heads, size = to_q.shape[1:]
        to_q, to_k, to_v = to_q.contiguous(), to_k.contiguous(), to_v.contiguous()
        to_inputs: list[Tensor] = []
        to_gains: list[Tensor | None] = []
        for qkv, gains, at in ((text, text_gains, text_at), (latent, latent_gains, latent_at)):
            tiles = ceil_div(len(qkv), HEAD_ROWS)
            to_qkv = torch.empty_like(qkv)
            parts = None if gains is None else gains.new_empty(tiles, 2, n_heads, size)
            if tiles:
                heads_backward[(tiles, n_heads)](
                    *(to_q, to_k, to_v, qkv, gains, at, to_qkv, parts, len(qkv), n_heads),
                    **_head_shape(size),
                    NORM=gains is not None,
                )
            to_inputs.append(to_qkv)
            to_gains.append(None if parts is None else parts.sum(0))
        return *to_inputs, *to_gains, None, None, None


def _head_shape(size: int) -> dict[str, int]:
    return {"D": size, "COLUMNS": 1 << (size - 1).bit_length(), "ROWS": HEAD_ROWS, "num_warps": 4}

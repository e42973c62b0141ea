"""Attention within full rows, each of some tokens and one latent, without the latents among the tokens.

A library's kernel likes lengths that are multiples of its tiles: on an H200 cuDNN takes 1.2 times as long for 2049 as
for 2048, and joining the latents to the texts and parting them again copies all of both. So the library attends texts
to texts, and one pass over memory adds the latent: softmax over the tokens and the latent follows from softmax over the
tokens and the logarithm of its sum (Milakov & Gimelshein 2018). Backward, the library's kernel is given outputs and
logarithms with the latent: it computes shares and what lies along the output from these (Dao et al. 2022, algorithm 4),
and so gives the gradients of the whole for the texts' part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from job.model.sublayer import ceil_div

TOKENS, WARPS = 64, 4  # of a tile
TILES = 32  # whose parts are summed at a time


class Attended(NamedTuple):
    """What a library's kernel gives."""

    out: Tensor  # [R, h, S, d]
    lse: Tensor  # [R, h, S] or [R, h, S, 1] float32: logarithms of the sums of exponents
    rest: tuple[Any, ...]  # what its backward pass wants besides


class CuDNN:
    """The kernels by cuDNN behind PyTorch's scaled_dot_product_attention, which keeps their logarithms to itself."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Attended:
        out, lse, *rest, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return Attended(out, lse, tuple(rest))

    @staticmethod
    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended) -> tuple[Tensor, ...]:
        out, lse, (ends_q, ends_k, max_q, max_k, seed, offset) = attended
        of_rows = (None, ends_q, ends_k, max_q, max_k)
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(gradient, q, k, v, out, lse, seed, offset), *of_rows, 0.0, False
        )


def cudnn_serves(x: Tensor) -> bool:
    """Whether cuDNN attends to rows of heads [.., S, h, d] like these: of one token, for instance, it does not."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or torch.are_deterministic_algorithms_enabled():
        return False
    x = x.new_empty(1, 1, x.shape[-3], x.shape[-1])
    parameters = torch.backends.cuda.SDPAParams(x, x, x, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(parameters)


def attend_full(
    text: Tensor, latent: Tensor, text_gains: Tensor | None, latent_gains: Tensor | None, n_heads: int, library: Any
) -> tuple[Tensor, Tensor]:
    """Attention's outputs for texts [R * S, h * d] and latents [R, h * d] in rows of S tokens and a latent.

    text [R * S, 3hd] and latent [R, 3hd] are queries, keys and values before their norm; gains as in `join_heads`.
    `library` is CuDNN, or what stands for it.
    """
    return _AttendFull.apply(text, latent, text_gains, latent_gains, n_heads, library)


class _AttendFull(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        text: Tensor,
        latent: Tensor,
        text_gains: Tensor | None,
        latent_gains: Tensor | None,
        n_heads: int,
        library: Any,
    ) -> tuple[Tensor, Tensor]:
        from job.model.attention_kernels import latent_forward, merge_forward, tokens_forward

        rows, size = len(latent), text.shape[1] // (3 * n_heads)
        n_tokens = len(text) // rows
        tiles = ceil_div(n_tokens, TOKENS)
        heads = text.new_empty(3, len(text), n_heads, size)
        scores = text.new_empty(rows * n_heads, n_tokens, dtype=torch.float32)
        parts = scores.new_empty(rows * n_heads, tiles, size + 2)
        shape, normed = _shape(size), text_gains is not None
        tokens_forward[(rows * n_heads, tiles)](
            *(text, text_gains, latent, latent_gains, *heads, scores, parts, n_tokens, n_heads, size**-0.5),
            **shape,
            TOKENS=TOKENS,
            NORM=normed,
        )
        attended = library.forward(*_side_by_side(heads, rows))
        # The latents' part is added in place, so the places must be its own.
        out = attended.out.transpose(1, 2).contiguous()
        merge_forward[(rows * n_heads, tiles)](
            *(out, attended.lse, *attended.lse.stride()[:3], scores, latent, n_tokens, n_heads),
            **shape,
            TOKENS=TOKENS,
        )
        latent_out = latent.new_empty(rows, n_heads, size)
        latent_lse = scores.new_empty(rows * n_heads)
        latent_forward[(rows * n_heads,)](
            *(latent, latent_gains, parts, latent_out, latent_lse, tiles, n_heads, size**-0.5),
            **shape,
            TILES=TILES,
            NORM=normed,
        )
        tensors = [x for x in attended.rest if isinstance(x, Tensor)]
        ctx.save_for_backward(
            *(text, latent, text_gains, latent_gains, heads, out, attended.lse, latent_out, latent_lse), *tensors
        )
        ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in attended.rest]  # None: among the saved
        ctx.library = library
        return out.view(len(text), -1), latent_out.view(rows, -1)

    @staticmethod
    def backward(ctx: Any, to_text: Tensor, to_latent: Tensor) -> tuple[Tensor | None, ...]:
        from job.model.attention_kernels import keys_backward, latent_backward, queries_backward

        text, latent, text_gains, latent_gains, heads, out, lse, latent_out, latent_lse, *tensors = ctx.saved_tensors
        in_turn = iter(tensors)
        rest = tuple(next(in_turn) if x is None else x[0] for x in ctx.rest)
        rows, n_heads, size = latent_out.shape
        to_text, to_latent = to_text.contiguous(), to_latent.contiguous()
        (gradient,), attended = _side_by_side([to_text.view_as(out)], rows), Attended(out.transpose(1, 2), lse, rest)
        to_heads = ctx.library.backward(gradient, *_side_by_side(heads, rows), attended)
        to_q, to_k, to_v = (x.transpose(1, 2).contiguous() for x in to_heads)
        tiles = ceil_div(out.shape[1], TOKENS)
        to_qkv, to_latent_qkv = torch.empty_like(text), torch.empty_like(latent)
        parts = latent_lse.new_empty(rows * n_heads, tiles, 3, size)
        gain_parts, latent_gain_parts = None, None
        if text_gains is not None:
            gain_parts = parts.new_empty(rows * tiles, 2, n_heads, size)
            latent_gain_parts = parts.new_empty(rows, 2, n_heads, size)
        sizes = {**_shape(size), "NORM": text_gains is not None}
        of_latents = (latent, latent_gains)
        made, numbers = (to_qkv, gain_parts, parts), (out.shape[1], n_heads, size**-0.5)
        queries_backward[(rows * n_heads, tiles)](
            *(to_q, text, text_gains, out, lse, *lse.stride()[:3], to_text, *of_latents, *made, *numbers),
            **sizes,
            TOKENS=TOKENS,
        )
        keys_backward[(rows * n_heads, tiles)](
            *(to_k, to_v, text, text_gains, *of_latents, latent_out, latent_lse, to_latent, *made, *numbers),
            **sizes,
            TOKENS=TOKENS,
        )
        latent_backward[(rows * n_heads,)](
            *(*of_latents, latent_out, latent_lse, to_latent, parts, to_latent_qkv, latent_gain_parts),
            *(tiles, n_heads, size**-0.5),
            **sizes,
            TILES=TILES,
        )
        to_gains = [None if x is None else x.sum(0) for x in (gain_parts, latent_gain_parts)]
        return to_qkv, to_latent_qkv, *to_gains, None, None


def _side_by_side(heads: Any, rows: int) -> list[Tensor]:
    """Heads [R * S, h, d] or [R, S, h, d] as [R, h, S, d]."""
    return [x.view(rows, -1, *x.shape[-2:]).transpose(1, 2) for x in heads]


def _shape(size: int) -> dict[str, int]:
    return {"D": size, "COLUMNS": 1 << (size - 1).bit_length(), "num_warps": WARPS}

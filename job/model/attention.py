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

from job.model.heads import heads_backward_of, heads_of
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
    """Whether cuDNN attends to heads [.., h, d] like these."""
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
        from job.model.attention_kernels import latent_forward, merge_forward

        rows, size = len(latent), text.shape[1] // (3 * n_heads)
        of_text, of_latent = heads_of(text, text_gains, n_heads), heads_of(latent, latent_gains, n_heads)
        attended = library.forward(*_side_by_side(of_text, rows))
        # The latents' part is added in place, so the places must be its own.
        out = attended.out.transpose(1, 2).contiguous()
        tiles = ceil_div(out.shape[1], TOKENS)
        parts = text.new_empty(rows * n_heads, tiles, size + 2, dtype=torch.float32)
        merge_forward[(rows * n_heads, tiles)](
            *(*of_text, out, attended.lse, *attended.lse.stride()[:3], *of_latent, parts),
            *(out.shape[1], n_heads, size**-0.5),
            **_shape(size),
            TOKENS=TOKENS,
        )
        latent_out = latent.new_empty(rows, n_heads, size)
        latent_lse = parts.new_empty(rows * n_heads)
        latent_forward[(rows * n_heads,)](
            *(*of_latent, parts, latent_out, latent_lse, tiles, size**-0.5), **_shape(size), TILES=TILES
        )
        tensors = [x for x in attended.rest if isinstance(x, Tensor)]
        ctx.save_for_backward(
            *(text, latent, text_gains, latent_gains, *of_text, *of_latent, out, attended.lse, latent_out, latent_lse),
            *tensors,
        )
        ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in attended.rest]  # None: among the saved
        ctx.n_heads, ctx.library = n_heads, library
        return out.view(len(text), -1), latent_out.view(rows, -1)

    @staticmethod
    def backward(ctx: Any, to_text: Tensor, to_latent: Tensor) -> tuple[Tensor | None, ...]:
        from job.model.attention_kernels import keys_backward, latent_backward, queries_backward

        text, latent, text_gains, latent_gains, *saved = ctx.saved_tensors
        of_text, of_latent, (out, lse, latent_out, latent_lse, *tensors) = saved[:3], saved[3:6], saved[6:]
        in_turn = iter(tensors)
        rest = tuple(next(in_turn) if x is None else x[0] for x in ctx.rest)
        rows, n_heads, size = latent_out.shape
        to_text, to_latent = to_text.contiguous(), to_latent.contiguous()
        (gradient,), heads = _side_by_side([to_text.view_as(out)], rows), _side_by_side(of_text, rows)
        attended = Attended(out.transpose(1, 2), lse, rest)
        to_heads = [x.transpose(1, 2).contiguous() for x in ctx.library.backward(gradient, *heads, attended)]
        tiles = ceil_div(out.shape[1], TOKENS)
        to_qkv = torch.empty_like(text)
        gain_parts = None if text_gains is None else text_gains.new_empty(rows * tiles, *text_gains.shape)
        parts = latent_lse.new_empty(rows * n_heads, tiles, 3, size)
        to_q, to_k, to_v = to_heads
        latent_q, latent_k, latent_v = of_latent
        sizes = {**_shape(size), "TOKENS": TOKENS, "NORM": text_gains is not None}
        made, numbers = (to_qkv, gain_parts, parts), (out.shape[1], n_heads, size**-0.5)
        queries_backward[(rows * n_heads, tiles)](
            *(to_q, text, text_gains, out, lse, *lse.stride()[:3], to_text, latent_k, latent_v),
            *made,
            *numbers,
            **sizes,
        )
        keys_backward[(rows * n_heads, tiles)](
            *(to_k, to_v, text, text_gains, latent_q, latent_out, latent_lse, to_latent), *made, *numbers, **sizes
        )
        to_latents = parts.new_empty(3, rows, n_heads, size)
        latent_backward[(rows * n_heads,)](
            *(*of_latent, latent_out, latent_lse, to_latent, parts, to_latents),
            *(tiles, to_latents[0].numel(), size**-0.5),
            **_shape(size),
            TILES=TILES,
        )
        to_latent_qkv, to_latent_gains = heads_backward_of(to_latents, latent, latent_gains, n_heads)
        to_text_gains = None if gain_parts is None else gain_parts.sum(0)
        return to_qkv, to_latent_qkv, to_text_gains, to_latent_gains, None, None


def _side_by_side(heads: Any, rows: int) -> list[Tensor]:
    """Heads [R * S, h, d] or [R, S, h, d] as [R, h, S, d]."""
    return [x.view(rows, -1, *x.shape[-2:]).transpose(1, 2) for x in heads]


def _shape(size: int) -> dict[str, int]:
    return {"D": size, "COLUMNS": 1 << (size - 1).bit_length(), "num_warps": WARPS}

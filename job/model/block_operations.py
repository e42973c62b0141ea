"""A stock block by PyTorch's operations, run as they are or compiled: what fused_blocks.py must equal."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from job.model.packed import Layout, Spans
from job.model.streams import Mixing, read, write

TEXT, LATENT = 0, 1  # the backbone's numbers of the modalities
RECOMPILE_LIMIT = 64
Streams = tuple[Tensor, Tensor]  # of text [T, s, H] and latents [R, s, H], float32


def encode(
    block: Any, text: Tensor, latent: Tensor, cond: Tensor, layout: Layout, last: bool, is_compiled: bool
) -> Streams:
    """Both streams through one block, [T, s, H] and [R, s, H].

    In the last block only the tokens that a head reads come out.
    """
    enter, leave = (compiled(_enter), compiled(_leave)) if is_compiled else (_enter, _leave)
    # Every token gives keys and values, but in the last block only tokens that the text head reads ask. The latents all
    # do: they are few, and a selection would be one more shape to compile for.
    asking = layout.read_text if last else slice(0, len(text))
    text_qkv, text_mixing = enter(block, TEXT, text, cond, layout.text, asking)
    latent_qkv, latent_mixing = enter(block, LATENT, latent, cond, layout.latent, slice(0, len(latent)))
    text_out, latent_out = layout.attend(text_qkv, latent_qkv, last)
    text_spans, latent_spans = layout.text, layout.latent
    if last:
        text, text_mixing, text_spans = layout.select(layout.read_text, text, text_mixing, text_spans)
        latent, latent_mixing, latent_spans = layout.select(layout.read_latent, latent, latent_mixing, latent_spans)
    if len(text):
        text = leave(block, TEXT, text, text_mixing, text_out, cond, text_spans)
    if len(latent):
        latent = leave(block, LATENT, latent, latent_mixing, latent_out, cond, latent_spans)
    return text, latent


def compile_one(function: Any, backend: str = "inductor") -> Any:
    """A function compiled as graphs that serve all lengths and all blocks."""
    from torch._dynamo import config as dynamo  # here: it takes seconds to import
    from torch._functorch import config as functorch

    # Backward passes run outside autocast. The compiler would trace them inside, where the gradients that are written
    # out here meet bf16 in place of float32 (pytorch #179804).
    functorch.backward_pass_autocast = "off"
    # A graph for each modality, each set of heads, and whether a batch has one row: the modes of training come to more
    # than the 8 graphs that are allowed, and with fullgraph one more ends the run.
    dynamo.recompile_limit = RECOMPILE_LIMIT
    # Inside DDP's forward, Dynamo would cut each graph where DDP's buckets of gradients end, for their reduction to
    # begin. These graphs are half a block and end there by themselves; cut, they fuse less and compile twice as long.
    dynamo.optimize_ddp = False
    return torch.compile(function, dynamic=True, fullgraph=True, backend=backend)


compiled = cache(compile_one)


def _enter(
    block: Any, modality: int, streams: Tensor, cond: Tensor, spans: Spans, asking: slice
) -> tuple[tuple[Tensor, ...], Mixing | None]:
    """From streams [N, s, H] into attention: queries [Q, h, d] of the `asking` tokens, keys and values [N, h, d].

    Comes with the weights by which the block's answer is written back.
    """
    x, mixing = read(block.attn_residual_fns[modality], streams)
    x = _adaptive_norm(block.attn_layernorms[modality], x, cond, spans)
    return split_heads(block.joint_attn, modality, x, asking), mixing


def split_heads(attention: Any, modality: int, x: Tensor, asking: slice) -> tuple[Tensor, ...]:
    """Queries [Q, h, d] of the `asking` tokens of x [N, H], keys and values [N, h, d]."""
    weight = attention.to_qkv[modality].weight
    if asking == slice(0, len(x)):
        parts: Any = F.linear(x, weight).chunk(3, dim=-1)
    else:
        width = len(weight) // 3
        parts = F.linear(x[asking], weight[:width]), *F.linear(x, weight[width:]).chunk(2, dim=-1)
    n_heads = attention.split_heads.axes_lengths["h"]
    q, k, v = (part.unflatten(-1, (n_heads, -1)) for part in parts)
    if attention.qk_rmsnorm:
        q = _head_norm(q, attention.q_rmsnorms[modality]).to(v.dtype)
        k = _head_norm(k, attention.k_rmsnorms[modality]).to(v.dtype)
    return q, k, v


def _leave(
    block: Any,
    modality: int,
    streams: Tensor,
    mixing: Mixing | None,
    attended: Tensor,
    cond: Tensor,
    spans: Spans,
) -> Tensor:
    """Streams [N, s, H] after attention's outputs [N, h * d] and the feed-forward."""
    # The block gives gains of both branches for both modalities at once.
    branches = block.to_post_branch_gammas[-1](cond).chunk(2, dim=-1)
    attention_gain, ff_gain = (gains.split(block.dim_modalities, dim=-1)[modality] for gains in branches)
    attended = block.joint_attn.to_out[modality](attended)
    streams = write(streams, mixing, spans.scale(attended, attention_gain))
    x, mixing = read(block.ff_residual_fns[modality], streams)
    y = block.feedforwards[modality](_adaptive_norm(block.ff_layernorms[modality], x, cond, spans))
    return write(streams, mixing, spans.scale(y, ff_gain))


def _adaptive_norm(norm: Any, x: Tensor, cond: Tensor, spans: Spans) -> Tensor:
    """Layer norm of x [N, H] whose gain and bias follow from conditions [C, cond_dim] (Peebles & Xie 2023, DiT)."""
    gain, bias = norm.to_cond[-1](cond).chunk(
        2, dim=-1
    )  # the stock layer's SiLU before it was applied once for all blocks
    return spans.norm(x, gain, bias, norm.ln.eps)


def _head_norm(x: Tensor, norm: Any) -> Tensor:
    """RMS norm of the heads of x [N, h, d] with the stock layer's gains, float32."""
    return _HeadNorm.apply(x, norm.gamma[:, 0] * norm.scale)


class _HeadNorm(torch.autograd.Function):
    """x / |x| * gain over the heads of x [N, h, d], in float32.

    Written out with its gradient, since autograd's takes about twice the passes over memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = length.clamp_(min=1e-12).reciprocal_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, gain)
        return unit * gain

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        unit, inverse, gain = ctx.saved_tensors
        product = unit * gradient
        along = torch.einsum("nhd,hd->nh", product, gain)[..., None]  # the part along x, which the norm takes away
        return (gradient * gain).addcmul_(unit, along, value=-1).mul_(inverse), product.sum(0)

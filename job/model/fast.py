"""The fast path through a MultimodalMMDiT: the same weights and the same numbers as its `forward`, with less work.

Padding is dropped (packed.py), residual streams are fused (streams.py), rows that differ only in inputs and timesteps go through
together, a head sees only the rows that want it, and the last block computes only what a head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from job.model.groups import Padding, Rows
from job.model.packed import Layout, Spans
from job.model.streams import Mixing, read, write

Streams = tuple[Tensor, Tensor]  # of text [T, s, H] and latents [R, s, H], float32


def _norm(norm: Any, x: Tensor, cond: Tensor, spans: Spans) -> Tensor:
    """Adaptive layer norm of x [N, H] with conditions [C, cond_dim] that are through their SiLU."""
    gamma, beta = norm.to_cond[-1](cond).chunk(2, dim=-1)
    return spans.norm(x, gamma, beta, norm.ln.eps)


class _HeadNorm(torch.autograd.Function):
    """RMS norm of the heads of x [N, h, d] in float32, x / |x| * gain [h, d], and its gradient, in fewer passes than autograd's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_(min=1e-12).reciprocal_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, gain)
        return unit * gain

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        unit, inverse, gain = ctx.saved_tensors
        product = unit * gradient
        along = torch.einsum("nhd,hd->nh", product, gain)[..., None]
        return (gradient * gain).addcmul_(unit, along, value=-1).mul_(inverse), product.sum(0)


def _enter(
    block: Any, modality: int, streams: Tensor, cond: Tensor, spans: Spans, asking: slice
) -> tuple[tuple[Tensor, ...], Mixing | None]:
    """Queries [.., h, d] of the `asking` tokens, keys and values [N, h, d] of streams [N, s, H], and the weights of the way back."""
    attention = block.joint_attn
    x, weights = read(block.attn_residual_fns[modality], streams)
    x, weight = _norm(block.attn_layernorms[modality], x, cond, spans), attention.to_qkv[modality].weight
    if asking == slice(0, len(x)):
        parts: Any = F.linear(x, weight).chunk(3, dim=-1)
    else:
        width = len(weight) // 3
        parts = F.linear(x[asking], weight[:width]), *F.linear(x, weight[width:]).chunk(2, dim=-1)
    q, k, v = (part.unflatten(-1, (attention.split_heads.axes_lengths["h"], -1)) for part in parts)
    if attention.qk_rmsnorm:
        q, k = (
            _HeadNorm.apply(x, norms[modality].gamma[:, 0] * norms[modality].scale).to(v.dtype)
            for x, norms in ((q, attention.q_rmsnorms), (k, attention.k_rmsnorms))
        )
    return (q, k, v), weights


def _leave(
    block: Any, modality: int, streams: Tensor, weights: Mixing | None, attended: Tensor, cond: Tensor, spans: Spans
) -> Tensor:
    """Streams [N, s, H] after attention's outputs [N, h * d] and the feed-forward."""
    attention_gammas, ff_gammas = block.to_post_branch_gammas[-1](cond).chunk(2, dim=-1)
    attention_gamma, ff_gamma = (
        gammas.split(block.dim_modalities, dim=-1)[modality] for gammas in (attention_gammas, ff_gammas)
    )
    streams = write(streams, weights, spans.scale(block.joint_attn.to_out[modality](attended), attention_gamma))
    x, weights = read(block.ff_residual_fns[modality], streams)
    y = block.feedforwards[modality](_norm(block.ff_layernorms[modality], x, cond, spans))
    return write(streams, weights, spans.scale(y, ff_gamma))


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True, fullgraph=True)


def encode_block(
    block: Any, text: Tensor, latent: Tensor, cond: Tensor, layout: Layout, last: bool, compiled: bool
) -> Streams:
    """Both streams through one block."""
    enter, leave = (_compiled(_enter), _compiled(_leave)) if compiled else (_enter, _leave)
    text_qkv, text_weights = enter(block, 0, text, cond, layout.text, layout.read_text if last else slice(0, len(text)))
    latent_qkv, latent_weights = enter(block, 1, latent, cond, layout.latent, slice(0, len(latent)))
    text_out, latent_out = layout.attend(text_qkv, latent_qkv, last)
    text_spans, latent_spans = layout.text, layout.latent
    if last:
        text, text_weights, text_spans = layout.select(layout.read_text, text, text_weights, text_spans)
        latent, latent_weights, latent_spans = layout.select(layout.read_latent, latent, latent_weights, latent_spans)
    if len(text):
        text = leave(block, 0, text, text_weights, text_out, cond, text_spans)
    if len(latent):
        latent = leave(block, 1, latent, latent_weights, latent_out, cond, latent_spans)
    return text, latent


def encode(model: Any, groups: Sequence[Rows], padding: Padding) -> tuple[Tensor, Tensor]:
    """Inputs [T, H] of the text head and predictions [R, D] of the latent head, of the groups that ask for them, in their order.

    T runs over the tokens of all these groups that `padding` leaves. Groups that ask for the same head lie side by side.
    """
    layout = Layout(groups, padding)
    tokens = torch.cat([padding.pack(group.tokens) for group in groups])
    text = model.text_encoder.token_embed(tokens) + F.embedding(layout.positions, model.text_encoder.position_embed[0])
    latent = model.latent_encoder(torch.cat([group.latents for group in groups]))[:, 0]
    times = [torch.broadcast_tensors(group.text_t, group.latent_t) for group in groups]
    cond = F.silu(
        model.conditioning(torch.cat([text_t for text_t, _ in times]), torch.cat([latent_t for _, latent_t in times]))
    )
    streams = (x.float()[:, None].repeat(1, model.num_residual_streams, 1) for x in (text, latent))
    text, latent = streams
    for index, block in enumerate(model.mmdit.blocks):
        arguments = (text, latent, cond, layout, index == len(model.mmdit.blocks) - 1, model.compiled)
        keep = not (model.checkpointing and torch.is_grad_enabled())
        text, latent = block.encode(*arguments) if keep else checkpoint(block.encode, *arguments, use_reentrant=False)
    text, latent = (norm(x.sum(1)) for norm, x in zip(model.mmdit.norms, (text, latent), strict=True))
    return text, model.latent_head(latent)

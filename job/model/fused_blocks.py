"""A stock block with whole sublayers in one Triton kernel each (sublayer.py): what a GPU computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from job.model.attention import CuDNN, attend_full, cudnn_serves
from job.model.beside import beside, join
from job.model.block_operations import LATENT, TEXT, Streams, split_heads
from job.model.conditioned import Conditioned
from job.model.elementwise import biased_gelu
from job.model.flash4 import Flash4, flash4_serves
from job.model.heads import join_heads
from job.model.packed import Layout
from job.model.sublayer import Branch, Reading, cut, read_streams, write_and_read, write_streams

LATENTS_FIRST = (LATENT, TEXT)  # so that what they start beside the texts does not wait for these
Unwritten = list[Branch] | None  # of text and latents: what feed-forwards gave that is not yet in the streams


def encode(
    block: Any, text: Tensor, latent: Tensor, unwritten: Unwritten, given: Conditioned, layout: Layout, last: bool
) -> tuple[Streams, Unwritten]:
    """Both streams through one block, [T, s, H] and [R, s, H]; in the last, only the tokens that a head reads come out.

    The kernel that writes a feed-forward's output reads the next branch's input meanwhile, so each block but the last
    leaves the writing to the next.
    """
    norms = (*block.attn_layernorms, *block.ff_layernorms)
    readings = [
        Reading(*connection, modulation, norm.ln.eps)
        for connection, modulation, norm in zip(given.connections, given.modulations, norms, strict=True)
    ]
    streams, segments = [text, latent], list(layout.segments(text.shape[-1]))
    mixings: list[Any] = [None, None]
    inputs: list[Any] = [None, None]
    for modality in LATENTS_FIRST:
        with _on_branch(modality, given, segments[modality], streams[modality]):
            rows, reading = segments[modality], readings[modality]
            streams[modality], inputs[modality], mixings[modality] = (
                write_and_read(streams[modality], rows, unwritten[modality], reading)
                if unwritten
                else read_streams(streams[modality], rows, reading)
            )
    attended = _attend(block.joint_attn, inputs, given.head_gains, layout, last)
    left: list[Any] = [None, None]
    for modality in LATENTS_FIRST:
        with _on_branch(modality, attended[modality]):
            if last:
                part = layout.read_text if modality == TEXT else layout.read_latent
                streams[modality], mixings[modality] = streams[modality][part], mixings[modality][part]
                conditions, _, firsts = segments[modality]
                segments[modality] = cut(conditions[part], len(firsts) - 1, text.shape[-1])
            if not len(streams[modality]):
                continue
            rows, reading = segments[modality], readings[2 + modality]
            to_out = block.joint_attn.to_out[modality]
            output = F.linear(attended[modality], to_out.weight)
            branch = Branch(output, given.gains[modality], mixings[modality], to_out.bias)
            streams[modality], x, mixing = write_and_read(streams[modality], rows, branch, reading)
            feedforward = block.feedforwards[modality]
            output = _feed_forward(feedforward, x)
            left[modality] = Branch(output, given.gains[2 + modality], mixing, feedforward.ff[-1].bias)
            if last:
                streams[modality] = write_streams(streams[modality], rows, left[modality])
    if last:
        join(streams[LATENT])
    return (streams[TEXT], streams[LATENT]), None if last else left


def _on_branch(modality: int, *used: Any) -> AbstractContextManager[None]:
    """Where kernels of one modality alone are started."""
    return beside(used) if modality == LATENT else nullcontext()


def _attend(
    attention: Any, inputs: list[Tensor], gains: list[Tensor | None], layout: Layout, last: bool
) -> tuple[Tensor, Tensor]:
    """Attention's outputs [T, h * d] and [R, h * d] for its inputs [T, H] and [R, H]."""
    text, latent = inputs
    n_heads = attention.split_heads.axes_lengths["h"]
    head_size = len(attention.to_qkv[TEXT].weight) // (3 * n_heads)
    if last or not layout.joins(text.new_empty(0, head_size)):
        join(latent)
        asking = layout.read_text if last else slice(0, len(text))
        of_latent = split_heads(attention, LATENT, latent, slice(0, len(latent)))
        return layout.attend(split_heads(attention, TEXT, text, asking), of_latent, last)
    with beside():
        latent_qkv = F.linear(latent, attention.to_qkv[LATENT].weight)
    text_qkv = F.linear(text, attention.to_qkv[TEXT].weight)
    join(latent_qkv)
    of_both = (gains[TEXT], gains[LATENT])
    if layout.padding.full:
        heads = text_qkv.view(len(latent), -1, 3 * n_heads, head_size)
        library = Flash4 if flash4_serves(heads) else CuDNN if cudnn_serves(heads) else None
        if library:
            return attend_full(text_qkv, latent_qkv, *of_both, n_heads, library)
    joined = join_heads(text_qkv, latent_qkv, *of_both, layout.end_to_end[1], n_heads)
    return layout.attend_joined(joined)


def _feed_forward(feedforward: Any, x: Tensor) -> Tensor:
    """The stock feed-forward's output [N, H] for x [N, H], without its last bias; the first and GELU are one kernel."""
    (into, _), dropout, out = feedforward.ff
    return F.linear(dropout(biased_gelu(F.linear(x, into.weight), into.bias)), out.weight)

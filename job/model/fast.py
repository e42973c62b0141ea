"""The fast implementation: the same weights and the same numbers as the stock blocks, with less work.

- Padding is dropped: texts lie end to end (packed.py).
- Residual streams are read and written in few passes over memory (streams.py).
- Groups of rows that differ only in inputs and timesteps go through the blocks as one batch.
- A head sees only the rows that want it, and the last block computes only what a head reads.
- The cross-entropy never holds the logits of more than a few hundred tokens (cross_entropy.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from job.config import ModelConfig
from job.model.cross_entropy import linear_cross_entropy
from job.model.elementwise import biased_gelu
from job.model.graphs import Graphs, filled
from job.model.groups import Encoded, Group, Padding, TextLoss, TextTargets
from job.model.heads import join_heads
from job.model.multimodal import MultimodalMMDiT
from job.model.packed import Layout, Spans
from job.model.streams import Mixing, read, write
from job.model.sublayer import (
    MAX_WIDTH,
    STREAMS,
    Branch,
    Reading,
    connection_weights,
    kernels_serve,
    read_streams,
    write_and_read,
    write_streams,
)

TEXT, LATENT = 0, 1  # the backbone's numbers of the modalities
RECOMPILE_LIMIT = 64
Streams = tuple[Tensor, Tensor]  # of text [T, s, H] and latents [R, s, H], float32
Unwritten = list[Branch] | None  # of text and latents: what feed-forwards gave that is not yet in the streams


class FastMMDiT(MultimodalMMDiT):
    """MultimodalMMDiT with packed rows.

    Its form of a text are the text head's inputs [T, H] for the computed tokens.
    """

    # Where a step falls into two halves that no gradient joins, the first half's activations are gone before the
    # second's are made.
    staged = True

    def __init__(self, config: ModelConfig, vocab_size: int, latent_dim: int) -> None:
        super().__init__(config, vocab_size, latent_dim)
        self.compiled = False  # torch.compile the blocks, in training: an evaluation is over before it pays
        self.recording = False  # replay the blocks' kernels as CUDA graphs, in training on a GPU
        self.graphs: Graphs | None = None
        self.dropout = config.dropout
        self.fits_kernels = config.num_residual_streams == STREAMS and config.hidden_size <= MAX_WIDTH
        self.checkpointing = False  # keep no activations inside blocks, compute them again in backward
        for block in self.mmdit.blocks:  # type: ignore[union-attr]
            # A method of the block, so that FSDP can gather the block's weights for the call and let go of them after.
            block.encode = MethodType(encode_block, block)

    def encode(self, groups: Sequence[Group], padding: Padding) -> Encoded:
        if not self._records(padding):
            return Encoded(*self._trunk(self._text_input(groups, padding), groups, padding))
        if self.graphs is None:
            self.graphs = Graphs(self, self._trunk)
        filled_groups, filled_padding = filled(groups, padding)
        text, latent = self.graphs.run(self._text_input(filled_groups, filled_padding), filled_groups, filled_padding)
        return Encoded(text[: sum(padding.lengths)], latent[: len(padding.lengths)])

    def _records(self, padding: Padding) -> bool:
        """Whether the blocks' kernels are recorded and replayed (graphs.py).

        Only those of "kernels": the other ways ask the host for rows' lengths, and a recording has stand-ins for them.
        """
        return (
            self.recording
            and self.training
            and torch.is_grad_enabled()
            and self.way(padding.mask.device) == "kernels"
            and not (padding.keep or self.checkpointing or self.dropout or torch.are_deterministic_algorithms_enabled())
            and not (self.graphs and self.graphs.waiting)
        )

    def way(self, device: torch.device) -> str:
        """How blocks are computed on a device: "compiled", by "kernels", or by "operations" of PyTorch."""
        if self.compiled and self.training:
            return "compiled"
        return "kernels" if self.fits_kernels and kernels_serve(device) else "operations"

    def _trunk(self, text: Tensor, groups: Sequence[Group], padding: Padding) -> tuple[Tensor, Tensor]:
        """The text head's inputs [T, H] and predictions [B, D] of the latent head, for texts [T, H] of all groups."""
        layout = Layout(groups, padding)
        cond = self._conditions(groups)
        streams: Streams = (self._streams(text), self._latent_input(groups))
        unwritten: Unwritten = None
        way = self.way(text.device)
        blocks: Any = self.mmdit.blocks
        for block in blocks:
            last = block is blocks[-1]
            arguments = (*streams, unwritten, cond, layout, last, way)
            if self.checkpointing and torch.is_grad_enabled():
                streams, unwritten = checkpoint(block.encode, *arguments, use_reentrant=False)
            else:
                streams, unwritten = block.encode(*arguments)
        norms: Any = self.mmdit.norms
        text_out, latent_out = (norm(stream.sum(1)) for norm, stream in zip(norms, streams, strict=True))
        return text_out, self.latent_head(latent_out)

    def logits(self, text: Tensor, padding: Padding) -> Tensor:
        return padding.unpack(self.text_head(text))

    def text_loss(self, text: Tensor, targets: TextTargets, padding: Padding) -> TextLoss:
        tokens, weights, uniform = padding.pack(targets.tokens), None, None
        if targets.row_weights is not None:
            weights = padding.pack(targets.row_weights[:, None].expand_as(targets.tokens))
        if targets.counted is not None:
            place = padding.pack(targets.counted).nonzero()[:, 0]
            text, tokens = text[place], tokens[place]
            weights = None if weights is None else weights[place]
        if targets.uniform is not None:
            uniform = padding.pack(targets.uniform)
        total, picked = linear_cross_entropy(text, self.text_head, tokens, targets.pick, uniform, weights)
        return TextLoss(total, padding.unpack(picked) if targets.pick else None)

    def _text_input(self, groups: Sequence[Group], padding: Padding) -> Tensor:
        """Tokens and positions [T, H] of all groups' texts."""
        rows, seq_len = padding.mask.shape
        tokens = torch.cat([padding.pack(group.tokens) for group in groups])
        place = padding.pack(torch.arange(seq_len, device=tokens.device).expand(rows, -1))
        positions = F.embedding(place.repeat(len(groups)), self.text_encoder.position_embed[0])
        return self.text_encoder.token_embed(tokens) + positions

    def _latent_input(self, groups: Sequence[Group]) -> Tensor:
        """Streams [R, s, H] of all groups' latents."""
        return self._streams(self.latent_encoder(torch.cat([group.latents for group in groups]))[:, 0])

    def _streams(self, x: Tensor) -> Tensor:
        return x.float()[:, None].repeat(1, self.num_residual_streams, 1)

    def _conditions(self, groups: Sequence[Group]) -> Tensor:
        """Conditions [C, cond_dim] through their SiLU: one for each pair of timesteps that a group names."""
        times = [torch.broadcast_tensors(group.text_t, group.latent_t) for group in groups]
        text_t, latent_t = (torch.cat(part) for part in zip(*times, strict=True))
        return F.silu(self.conditioning(text_t, latent_t))


def encode_block(
    block: Any, text: Tensor, latent: Tensor, unwritten: Unwritten, cond: Tensor, layout: Layout, last: bool, way: str
) -> tuple[Streams, Unwritten]:
    """Both streams through one block, [T, s, H] and [R, s, H], in one of the ways of FastMMDiT.way.

    In the last block only the tokens that a head reads come out. What the feed-forwards gave may be left to the next
    block to write.
    """
    if way == "kernels":
        return _encode_fused(block, text, latent, unwritten, cond, layout, last)
    enter, leave = (compiled(_enter), compiled(_leave)) if way == "compiled" else (_enter, _leave)
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
    return (text, latent), None


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
    return _heads(block.joint_attn, modality, x, asking), mixing


def _heads(attention: Any, modality: int, x: Tensor, asking: slice) -> tuple[Tensor, ...]:
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


def _encode_fused(
    block: Any, text: Tensor, latent: Tensor, unwritten: Unwritten, cond: Tensor, layout: Layout, last: bool
) -> tuple[Streams, Unwritten]:
    """encode_block with whole sublayers in one kernel each (sublayer.py).

    The kernel that writes a feed-forward's output reads the next branch's input meanwhile, so each block but the last
    leaves the writing to the next.
    """
    weights = connection_weights([*block.attn_residual_fns, *block.ff_residual_fns])
    sizes = block.dim_modalities
    gains = block.to_post_branch_gammas[-1](cond).split([*sizes, *sizes], dim=-1)
    streams, spans = [text, latent], [layout.text, layout.latent]
    mixings, inputs = [], []
    for modality in (TEXT, LATENT):
        index = spans[modality].index
        reading = _reading(block.attn_layernorms[modality], cond, weights[modality])
        if unwritten:
            streams[modality], x, mixing = write_and_read(streams[modality], index, unwritten[modality], reading)
        else:
            streams[modality], x, mixing = read_streams(streams[modality], index, reading)
        inputs.append(x)
        mixings.append(mixing)
    attended = _attend_fused(block.joint_attn, inputs, layout, last)
    if last:
        for modality, part in ((TEXT, layout.read_text), (LATENT, layout.read_latent)):
            streams[modality], mixings[modality] = streams[modality][part], mixings[modality][part]
            spans[modality] = spans[modality].select(part)
    branches = []
    for modality in (TEXT, LATENT):
        if not len(streams[modality]):
            continue
        index = spans[modality].index
        branch = Branch(block.joint_attn.to_out[modality](attended[modality]), gains[modality], mixings[modality])
        reading = _reading(block.ff_layernorms[modality], cond, weights[2 + modality])
        streams[modality], x, mixing = write_and_read(streams[modality], index, branch, reading)
        branch = Branch(_feed_forward_fused(block.feedforwards[modality], x), gains[2 + modality], mixing)
        if last:
            streams[modality] = write_streams(streams[modality], index, branch)
        branches.append(branch)
    return (streams[TEXT], streams[LATENT]), None if last else branches


def _attend_fused(attention: Any, inputs: list[Tensor], layout: Layout, last: bool) -> tuple[Tensor, Tensor]:
    """Attention's outputs [T, h * d] and [R, h * d] for its inputs [T, H] and [R, H]."""
    text, latent = inputs
    n_heads = attention.split_heads.axes_lengths["h"]
    head_size = len(attention.to_qkv[TEXT].weight) // (3 * n_heads)
    if last or not layout.joins(text.new_empty(0, head_size)):
        asking = layout.read_text if last else slice(0, len(text))
        of_latent = _heads(attention, LATENT, latent, slice(0, len(latent)))
        return layout.attend(_heads(attention, TEXT, text, asking), of_latent, last)
    head_gains: list[Tensor | None] = [None, None]
    if attention.qk_rmsnorm:
        norms = zip(attention.q_rmsnorms, attention.k_rmsnorms, strict=True)
        head_gains = [torch.stack([q.gamma[:, 0], k.gamma[:, 0]]) * q.scale for q, k in norms]
    text_qkv, latent_qkv = (F.linear(x, to_qkv.weight) for x, to_qkv in zip(inputs, attention.to_qkv, strict=True))
    joined = join_heads(text_qkv, latent_qkv, head_gains[TEXT], head_gains[LATENT], layout.end_to_end[1], n_heads)
    return layout.attend_joined(joined)


def _feed_forward_fused(feedforward: Any, x: Tensor) -> Tensor:
    """The stock feed-forward's output [N, H] for x [N, H], its first bias and its GELU in one kernel."""
    (into, _), dropout, out = feedforward.ff
    return out(dropout(biased_gelu(F.linear(x, into.weight), into.bias)))


def _reading(norm: Any, cond: Tensor, weights: tuple[Tensor, Tensor]) -> Reading:
    """How a branch whose adaptive norm is `norm` reads the streams."""
    return Reading(*weights, norm.to_cond[-1](cond), norm.ln.eps)


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

"""The fast implementation: the same weights and the same numbers as the stock blocks, with less work.

- Padding is dropped: texts lie end to end (packed.py).
- Residual streams are read and written in few passes over memory (streams.py).
- Groups of rows that differ only in inputs and timesteps go through the blocks as one batch.
- A head sees only the rows that want it, and the last block computes only what a head reads.
- The cross-entropy holds the logits of some of the tokens at a time (cross_entropy.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from job.config import ModelConfig
from job.model import block_operations, fused_blocks
from job.model.block_operations import TEXT, Streams
from job.model.conditioned import Conditioned, Stacked, conditioned_layers, prepare
from job.model.cross_entropy import linear_cross_entropy
from job.model.filling import filled
from job.model.fused_blocks import Unwritten
from job.model.graphs import Graphs
from job.model.groups import Encoded, Group, Padding, TextLoss, TextTargets
from job.model.multimodal import MultimodalMMDiT
from job.model.packed import Layout
from job.model.products import Products
from job.model.sublayer import MAX_WIDTH, STREAMS, kernels_serve


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
        # Compute what blocks take from the conditions for all at once; not where each gathers its weights for its call.
        self.preparing = True
        self.in_float8 = False  # compute texts' products with blocks' weights in 8-bit floats, in training
        self.dropout = config.dropout
        self.fits_kernels = config.num_residual_streams == STREAMS and config.hidden_size <= MAX_WIDTH
        self.checkpointing = False  # keep no activations inside blocks, compute them again in backward
        for block in self.mmdit.blocks:  # type: ignore[union-attr]
            # A method of the block, so that FSDP can gather the block's weights for the call and let go of them after.
            # A MethodType would be pickled as the block's attribute of the function's name, which does not exist.
            block.encode = partial(encode_block, block)

    def encode(self, groups: Sequence[Group], padding: Padding) -> Encoded:
        if not self._records(padding):
            in_float8 = self.in_float8 and self.training
            return Encoded(*self._trunk(self._text_input(groups, padding), groups, padding, in_float8=in_float8))
        if self.graphs is None:
            blocks: Any = self.mmdit.blocks
            weights = [weight for block in blocks for weight in weights_of_texts(block)] if self.in_float8 else []
            self.graphs = Graphs(self, self._trunk, conditioned_layers(blocks), weights)
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

    def _trunk(
        self,
        text: Tensor,
        groups: Sequence[Group],
        padding: Padding,
        stacked: Stacked | None = None,
        in_float8: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The text head's inputs [T, H] and predictions [B, D] of the latent head, for texts [T, H] of all groups.

        Products of texts are computed `in_float8` here; in a recording it sees to that itself (graphs.py).
        """
        layout = Layout(groups, padding)
        cond = self._conditions(groups)
        streams: Streams = (self._streams(text), self._latent_input(groups))
        unwritten: Unwritten = None
        way = self.way(text.device)
        blocks: Any = self.mmdit.blocks
        whole = way == "kernels" and self.preparing
        given: Sequence[Tensor | Conditioned] = prepare(blocks, cond, stacked) if whole else [cond] * len(blocks)
        for block, of_block in zip(blocks, given, strict=True):
            last = block is blocks[-1]
            arguments = (*streams, unwritten, of_block, layout, last, way, in_float8)
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
    block: Any,
    text: Tensor,
    latent: Tensor,
    unwritten: Unwritten,
    given: Tensor | Conditioned,
    layout: Layout,
    last: bool,
    way: str,
    in_float8: bool,
) -> tuple[Streams, Unwritten]:
    """Both streams through one block, in one of the ways of FastMMDiT.way.

    `given` are the conditions [C, cond_dim] or what was made of them. What the feed-forwards gave may be left to the
    next block to write.
    """
    # Weights are told here, since where they are kept in shards they are others than before the call.
    with Products(in_float8={id(w): None for w in weights_of_texts(block)}) if in_float8 else nullcontext():
        if way == "kernels":
            (of_block,) = [given] if isinstance(given, Conditioned) else prepare([block], given)
            return fused_blocks.encode(block, text, latent, unwritten, of_block, layout, last)
        assert isinstance(given, Tensor)
        return block_operations.encode(block, text, latent, given, layout, last, way == "compiled"), None


def weights_of_texts(block: Any) -> list[Tensor]:
    """A block's weights that texts are multiplied with. Latents are few: their products take no time.

    The last block multiplies with parts of the first one, which are other tensors.
    """
    layers = block.feedforwards[TEXT].ff
    return [
        block.joint_attn.to_qkv[TEXT].weight,
        block.joint_attn.to_out[TEXT].weight,
        layers[0][0].weight,
        layers[-1].weight,
    ]

"""Rows without their padding: the texts of R rows end to end [T, ...], and one latent a row [R, ...].

With rows of 60% on average, padded rows would spend two fifths of every product on padding. Here products, norms and
residual streams see real tokens only; attention alone needs to know where a row begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from job.model.groups import Group, Padding
from job.model.streams import Mixing

SHORT = 64  # tokens: rows up to this length attend side by side, padded, on a CPU
FEW = 8  # spans: up to so many are gone through one by one on a GPU
BOTH = ("text", "latent")


@dataclass(frozen=True)
class Spans:
    """N tokens in consecutive spans; the tokens of a span share one condition (of C).

    Conditions follow from timesteps, which rows mostly share: with `latent_t_mode: full` a whole group is one span.
    """

    counts: list[int]  # tokens of each span, known on the host
    index: Tensor  # [N]: condition of each token

    @property
    def by_index(self) -> bool:
        """Whether to look up every token's condition rather than go span by span.

        Span by span reads and writes less, but starts a kernel a span, which a GPU with many spans does not hide; and a
        compiler would make a new graph for every number of spans.
        """
        return torch.compiler.is_compiling() or (self.index.is_cuda and len(self.counts) > FEW)

    def norm(self, x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Layer norm of x [N, H] with the gain and bias [C, H] of each token's condition."""
        if self.by_index:
            return F.layer_norm(x, x.shape[-1:], eps=eps) * self._lookup(gain) + self._lookup(bias)
        gains, biases = gain.to(x.dtype), bias.to(x.dtype)
        # Given a gain and a bias, the kernel applies them in its own pass over memory.
        parts = zip(x.split(self.counts), gains, biases, strict=True)
        return torch.cat([F.layer_norm(part, x.shape[-1:], g, b, eps) for part, g, b in parts])

    def scale(self, x: Tensor, gain: Tensor) -> Tensor:
        """x [N, H] times the gain [C, H] of each token's condition."""
        if self.by_index:
            return x * self._lookup(gain)
        return torch.cat([part * g for part, g in zip(x.split(self.counts), gain, strict=True)])

    def _lookup(self, table: Tensor) -> Tensor:
        """The row [H] of a table [C, H] that belongs to each token's condition, [N, H]."""
        return _Lookup.apply(table, self.index)

    def select(self, part: slice) -> Spans:
        """The tokens of a slice; their conditions keep their numbers."""
        counts, start = [], 0
        for count in self.counts:
            counts.append(max(0, min(start + count, part.stop) - max(start, part.start)))
            start += count
        return Spans(counts, self.index[part])


class _Lookup(torch.autograd.Function):
    """table[index] for a table [C, H] of few rows and an index [N] of many tokens.

    Indexing's own gradient adds token by token into the few rows: thousands of atomic additions that wait for each
    other on a GPU, each rounded to bf16 under autocast. A product with the one-hot matrix [C, N] sums in float32 and
    rounds once.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(table)
        return table[index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        rows = torch.arange(ctx.rows, device=index.device)
        return (rows[:, None] == index).to(gradient.dtype) @ gradient, None


class AttentionPart(NamedTuple):
    """What goes through the attention kernel in one call: one row, or the rows of a group side by side."""

    heads: tuple[str, ...]  # what is asked for: in the last block only what a head reads
    text_k: Tensor
    text_v: Tensor
    latent_q: Tensor
    latent_k: Tensor
    latent_v: Tensor


class Layout:
    """Where the tokens of G groups of B rows lie. All groups have the same row lengths."""

    def __init__(self, groups: Sequence[Group], padding: Padding) -> None:
        mask = padding.mask
        rows, seq_len = mask.shape
        self.heads = [group.heads for group in groups]
        self.padding = padding  # of one group
        self.whole = padding.repeat(len(groups))  # of all of them
        # Long ragged rows attend one by one, without their padding. Short ones attend side by side with a mask, since a
        # call costs more than the padding; so do all rows on a GPU, where a call for every row would never fill it.
        self.row_by_row = padding.ragged and seq_len > SHORT and not mask.is_cuda
        self.key_mask = None
        if not padding.full and not self.row_by_row:
            with_latent = F.pad(self.whole.mask, (0, 1), value=True)  # the latent stands behind the text
            self.key_mask = with_latent[:, None, None]
        positions = torch.arange(seq_len, device=mask.device).expand(rows, -1)
        self.positions = padding.pack(positions).repeat(len(groups))
        self.text, self.latent = self._spans(groups)
        self.read_text = self._read("text", size=sum(padding.lengths))
        self.read_latent = self._read("latent", size=rows)

    def _read(self, head: str, size: int) -> slice:
        """The places that a head reads, with `size` places a group. The groups that it reads lie side by side."""
        wanted = [number for number, heads in enumerate(self.heads) if head in heads]
        return slice(wanted[0] * size, (wanted[-1] + 1) * size) if wanted else slice(0, 0)

    def _spans(self, groups: Sequence[Group]) -> tuple[Spans, Spans]:
        """Spans of texts and of latents: one a row where a group's rows differ in their timesteps, else one a group.

        Counts come from the host and indices are made on the device: to send one to the other would be to wait.
        """
        rows, seq_len = self.padding.mask.shape
        row = torch.arange(rows, device=self.padding.mask.device)
        row_of_token = self.padding.pack(row[:, None].expand(-1, seq_len))
        text = _span_of_groups(groups, self.padding.lengths, row_of_token)
        latent = _span_of_groups(groups, [1] * rows, row)
        return text, latent

    def select(
        self, part: slice, streams: Tensor, mixing: Mixing | None, spans: Spans
    ) -> tuple[Tensor, Mixing | None, Spans]:
        """The tokens of a slice, with their mixing weights and spans."""
        return streams[part], mixing and Mixing(*(weight[part] for weight in mixing)), spans.select(part)

    def attend(self, text: tuple[Tensor, ...], latent: tuple[Tensor, ...], last: bool) -> tuple[Tensor, Tensor]:
        """Attention within rows: queries, keys and values of texts, [T, h, d] each, and of latents, [R, h, d] each.

        Returns outputs [.., h * d] of texts and latents. In the last block the text's queries are only those of groups
        that the text head reads, and only what a head reads comes out.
        """
        padding = self.padding if last else self.whole  # before the last block all groups' rows are alike, one part
        rows = len(padding.lengths)
        text_queries, parts = self._parts(text, latent, padding, self.heads if last else [BOTH])
        key_mask = None if self.key_mask is None else self.key_mask[:rows]
        text_out: list[Tensor] = []
        latent_out: list[Tensor] = []
        for part in parts:
            asks_text, asks_latent = "text" in part.heads, "latent" in part.heads
            q = self._joined(next(text_queries) if asks_text else None, part.latent_q if asks_latent else None, padding)
            k = self._joined(part.text_k, part.latent_k, padding)
            v = self._joined(part.text_v, part.latent_v, padding)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask).transpose(1, 2).flatten(2)
            if asks_text:
                of_text = out[:, :-1] if asks_latent else out
                text_out.append(of_text[0] if self.row_by_row else padding.pack(of_text))
            if asks_latent:
                # Contiguous, since a strided tensor would be compiled for once more.
                latent_out.append(out[:, -1].contiguous())
        nothing = text[1].new_empty(0, text[1].shape[1] * text[1].shape[2])
        return _cat(text_out or [nothing]), _cat(latent_out or [nothing])

    def _parts(
        self, text: tuple[Tensor, ...], latent: tuple[Tensor, ...], padding: Padding, heads: list[tuple[str, ...]]
    ) -> tuple[Iterator[Tensor], list[AttentionPart]]:
        """The parts of `len(heads)` groups, and queries of the texts of those that ask for text.

        By `split`, whose gradient is one concatenation; slices would each add into a tensor of zeros of the whole size.
        """
        rows = len(padding.lengths)
        if self.row_by_row:
            rows_of_part, sizes = 1, padding.lengths * len(heads)
        else:
            rows_of_part, sizes = rows, [sum(padding.lengths)] * len(heads)
        asked = [heads[part * rows_of_part // rows] for part in range(len(sizes))]
        sizes_of_queries = [size for size, wanted in zip(sizes, asked, strict=True) if "text" in wanted]
        text_k, text_v = (x.split(sizes) for x in text[1:])
        latent_parts = (x.split(rows_of_part) for x in latent)
        parts = [AttentionPart(*part) for part in zip(asked, text_k, text_v, *latent_parts, strict=True)]
        return iter(text[0].split(sizes_of_queries)), parts

    def _joined(self, text: Tensor | None, latent: Tensor | None, padding: Padding) -> Tensor:
        """Rows [.., h, n, d] of a part: its text with the latent behind, or one of the two."""
        parts = []
        if text is not None:
            parts.append(text[None] if self.row_by_row else padding.unpack(text))
        if latent is not None:
            parts.append(latent[:, None])
        return _cat(parts, dim=1).transpose(1, 2)


def _span_of_groups(groups: Sequence[Group], lengths: list[int], row_of_place: Tensor) -> Spans:
    """Spans of groups whose rows have `lengths` places each; `row_of_place` [N] is the row of each place of a group."""
    counts: list[int] = []
    index = []
    for group in groups:
        rows_differ = max(len(group.text_t), len(group.latent_t)) > 1
        first = len(counts)
        index.append(first + row_of_place if rows_differ else torch.full_like(row_of_place, first))
        counts += lengths if rows_differ else [sum(lengths)]
    return Spans(counts, torch.cat(index))


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)  # torch.cat copies a single tensor too

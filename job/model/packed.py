"""Rows without their padding: the texts of R rows end to end [T, ...], and one latent a row [R, ...].

With rows of 60% on average, padded rows would spend two fifths of every product on padding. Here products, norms and
residual streams see real tokens only; attention alone needs to know where a row begins. It has three ways:

- Full rows attend side by side, [R, S + 1, ...], without a mask: SDPA's flash kernel.
- Ragged rows attend end to end, [T + R, ...], each row's latent behind its text: on a GPU by one kernel that is told
  where rows begin (torch.nn.attention.varlen, bf16 only), on a CPU row by row.
- Where neither is to be had, and on a CPU where rows are short, they attend side by side with their padding and a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from job.model.end_to_end import Ends, EndToEnd, attend_end_to_end, has_varlen_kernel
from job.model.groups import Group, Padding
from job.model.streams import Mixing
from job.model.sublayer import Segments, cut

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


class Layout:
    """Where the tokens of G groups of B rows lie. All groups have the same row lengths."""

    def __init__(self, groups: Sequence[Group], padding: Padding) -> None:
        mask = padding.mask
        rows, seq_len = mask.shape
        self.heads = [group.heads for group in groups]
        self.padding = padding  # of one group
        self.whole = padding.repeat(len(groups))  # of all of them
        # Short rows attend side by side also on a CPU: a call costs more than their padding.
        self.long = seq_len > SHORT
        self.text, self.latent = self._spans(groups)
        self._segments: dict[int, list[Segments]] = {}
        self.read_text = self._read("text", size=sum(padding.lengths))
        self.read_latent = self._read("latent", size=rows)

    def segments(self, width: int) -> list[Segments]:
        """Of texts and of latents, for the kernels of their streams [N, s, width]; cut once for all blocks."""
        if width not in self._segments:
            self._segments[width] = [cut(spans.index, len(spans.counts), width) for spans in (self.text, self.latent)]
        return self._segments[width]

    @cached_property
    def key_mask(self) -> Tensor | None:
        """Which keys of all groups' rows count, side by side: [R, 1, 1, S + 1]; None: all of them."""
        if self.padding.full:
            return None
        return F.pad(self.whole.mask, (0, 1), value=True)[:, None, None]  # the latent stands behind the text

    @cached_property
    def end_to_end(self) -> tuple[EndToEnd, EndToEnd]:
        """Places of one group's rows and of all groups' rows."""
        return EndToEnd.of(self.padding), EndToEnd.of(self.whole)

    @cached_property
    def ends(self) -> tuple[Ends, Ends]:
        """Ends of all groups' rows, texts with latents, and of what asks in the last block."""
        lengths, on_device = self.padding.lengths, self.padding.mask.sum(1)
        of_asking = {
            ("text",): (lengths, on_device),
            ("latent",): ([1] * len(lengths), torch.ones_like(on_device)),
            BOTH: ([length + 1 for length in lengths], on_device + 1),
        }
        given = [of_asking[BOTH] for _ in self.heads]
        asking = [of_asking[heads] for heads in self.heads]
        all_of_them, last = (
            Ends.of([length for on_host, _ in parts for length in on_host], torch.cat([places for _, places in parts]))
            for parts in (given, asking)
        )
        return all_of_them, last

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
        ragged = self.padding.ragged
        if ragged and (has_varlen_kernel(text[1]) or (self.long and not text[1].is_cuda)):
            return self._attend_end_to_end(text, latent, last)
        return self._attend_side_by_side(text, latent, last)

    def joins(self, heads: Tensor) -> bool:
        """Whether rows attend as they lie end to end: full ones always, ragged heads [.., d] by a kernel."""
        return self.padding.full or (self.padding.ragged and has_varlen_kernel(heads))

    def attend_joined(self, heads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Attention within rows whose queries, keys and values [T + R, h, d] lie end to end; returns as `attend`."""
        if self.padding.full:
            rows = self.whole.mask.shape[0]
            q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in heads)
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1)
        else:
            given = self.ends[0]
            out = attend_end_to_end(*heads, given, given).flatten(1)
        return self.end_to_end[1].part(out)

    def _attend_end_to_end(
        self, text: tuple[Tensor, ...], latent: tuple[Tensor, ...], last: bool
    ) -> tuple[Tensor, Tensor]:
        of_group, of_all = self.end_to_end
        k, v = (of_all.join(*parts) for parts in zip(text[1:], latent[1:], strict=True))
        given, asking = self.ends
        if not last:
            q = of_all.join(text[0], latent[0])
            out_text, out_latent = of_all.part(attend_end_to_end(q, k, v, given, given).flatten(1))
            return out_text, out_latent
        queries = []
        of_texts, of_latents = self._queries(text[0], latent[0])
        for heads, text_q, latent_q in zip(self.heads, of_texts, of_latents, strict=True):
            if heads == BOTH:
                queries.append(of_group.join(text_q, latent_q))
            else:
                queries.append(text_q if "text" in heads else latent_q)
        out = attend_end_to_end(_cat(queries), k, v, asking, given).flatten(1)
        text_out: list[Tensor] = []
        latent_out: list[Tensor] = []
        for heads, part in zip(self.heads, out.split([len(q) for q in queries]), strict=True):
            if heads == BOTH:
                of_text, of_latent = of_group.part(part)
                text_out.append(of_text)
                latent_out.append(of_latent)
            else:
                (text_out if "text" in heads else latent_out).append(part)
        return _cat(text_out or [out[:0]]), _cat(latent_out or [out[:0]])

    def _queries(self, text: Tensor, latent: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Queries in the last block, by group: of texts [T, h, d] (none of a group that does not read them), of latents
        [B, h, d].

        By `split`, whose gradient is one concatenation; slices would each add into a tensor of zeros of the whole size.
        """
        size = sum(self.padding.lengths)
        texts = text.split([size if "text" in heads else 0 for heads in self.heads])
        return list(texts), list(latent.split(len(self.padding.lengths)))

    def _attend_side_by_side(
        self, text: tuple[Tensor, ...], latent: tuple[Tensor, ...], last: bool
    ) -> tuple[Tensor, Tensor]:
        # Before the last block all groups' rows are alike: one part.
        padding, heads_of_parts = (self.padding, self.heads) if last else (self.whole, [BOTH])
        rows = len(padding.lengths)
        key_mask = None if self.key_mask is None else self.key_mask[:rows]
        of_texts, of_latents = self._queries(text[0], latent[0]) if last else ([text[0]], [latent[0]])
        text_k, text_v = (x.split(sum(padding.lengths)) for x in text[1:])
        latent_k, latent_v = (x.split(rows) for x in latent[1:])
        text_out: list[Tensor] = []
        latent_out: list[Tensor] = []
        for part, heads in enumerate(heads_of_parts):
            asks_text, asks_latent = "text" in heads, "latent" in heads
            q = _joined(of_texts[part] if asks_text else None, of_latents[part] if asks_latent else None, padding)
            k, v = _joined(text_k[part], latent_k[part], padding), _joined(text_v[part], latent_v[part], padding)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask).transpose(1, 2).flatten(2)
            if asks_text:
                text_out.append(padding.pack(out[:, :-1] if asks_latent else out))
            if asks_latent:
                # Contiguous, since a strided tensor would be compiled for once more.
                latent_out.append(out[:, -1].contiguous())
        nothing = text[1].new_empty(0, text[1].shape[1] * text[1].shape[2])
        return _cat(text_out or [nothing]), _cat(latent_out or [nothing])


def _joined(text: Tensor | None, latent: Tensor | None, padding: Padding) -> Tensor:
    """Rows [B, h, n, d] side by side: their texts with the latents behind, or one of the two."""
    parts = []
    if text is not None:
        parts.append(padding.unpack(text))
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

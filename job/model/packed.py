"""Rows without their padding: the text of R rows end to end [T, ...], one latent a row [R, ...], and attention over both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from job.model.groups import Padding, Rows
from job.model.streams import Mixing

SHORT = 64  # tokens
FEW = 8  # spans


@dataclass(frozen=True)
class Spans:
    """N tokens in consecutive spans that share a condition each."""

    counts: list[int]
    index: Tensor  # [N]: condition of a token

    @property
    def by_index(self) -> bool:
        """Whether to look up every token's condition, in a fixed number of kernels, rather than go span by span, which reads and writes less."""
        return torch.compiler.is_compiling() or (self.index.is_cuda and len(self.counts) > FEW)

    def norm(self, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        """Layer norm of x [N, H] with a gain and a bias [C, H] per condition."""
        if self.by_index:
            return F.layer_norm(x, x.shape[-1:], eps=eps) * gamma[self.index] + beta[self.index]
        parts = zip(
            x.split(self.counts), gamma.to(x.dtype), beta.to(x.dtype), strict=True
        )  # the kernel applies gain and bias in its own pass
        return torch.cat([F.layer_norm(part, x.shape[-1:], g, b, eps) for part, g, b in parts])

    def scale(self, x: Tensor, gamma: Tensor) -> Tensor:
        """x [N, H] times gains [C, H]."""
        if self.by_index:
            return x * gamma[self.index]
        return torch.cat([part * g for part, g in zip(x.split(self.counts), gamma, strict=True)])

    def select(self, part: slice) -> Spans:
        """The tokens of a slice, whose conditions keep their numbers."""
        counts, start = [], 0
        for count in self.counts:
            counts.append(max(0, min(start + count, part.stop) - max(start, part.start)))
            start += count
        return Spans(counts, self.index[part])


class Layout:
    """Where the tokens of groups of B rows lie that share their lengths."""

    def __init__(self, groups: Sequence[Rows], padding: Padding) -> None:
        mask = padding.mask
        rows, seq_len = mask.shape
        self.heads = [group.heads for group in groups]
        self.padding, self.lengths = padding, padding.lengths
        self.whole = padding.repeat(len(groups))
        # Long rows attend one by one, without their padding; short ones, and all on a GPU, side by side with a mask: a call costs more than it saves.
        self.row_by_row = padding.ragged and seq_len > SHORT and not mask.is_cuda
        self.key_mask = (
            None if padding.full or self.row_by_row else F.pad(self.whole.mask, (0, 1), value=True)[:, None, None]
        )
        self.positions = padding.pack(torch.arange(seq_len, device=mask.device).expand(rows, -1)).repeat(len(groups))
        self.text, self.latent = self._spans(groups)
        # what the heads read, of the text tokens and of the rows: groups that a head reads lie side by side
        tokens = sum(self.lengths)
        self.read_text, self.read_latent = self._slice("text", tokens), self._slice("latent", rows)

    def _slice(self, head: str, size: int) -> slice:
        wanted = [g for g, heads in enumerate(self.heads) if head in heads]
        return slice(wanted[0] * size, (wanted[-1] + 1) * size) if wanted else slice(0, 0)

    def _spans(self, groups: Sequence[Rows]) -> tuple[Spans, Spans]:
        """Spans of text and latents: one a row where a group's rows differ in their timesteps, else one a group. Counts come from the host, indices are
        made on the device: sending them would wait for it."""
        rows, seq_len = self.padding.mask.shape
        row = torch.arange(rows, device=self.padding.mask.device)
        row_of_token = self.padding.pack(row[:, None].expand(-1, seq_len))
        counts: tuple[list[int], list[int]] = ([], [])
        indices: tuple[list[Tensor], list[Tensor]] = ([], [])
        for group in groups:
            each = max(len(group.text_t), len(group.latent_t)) > 1
            for count, index, lengths, places in zip(
                counts, indices, (self.lengths, [1] * rows), (row_of_token, row), strict=True
            ):
                index.append(len(count) + places if each else torch.full_like(places, len(count)))
                count += lengths if each else [sum(lengths)]
        text, latent = (Spans(count, torch.cat(index)) for count, index in zip(counts, indices, strict=True))
        return text, latent

    def select(
        self, part: slice, streams: Tensor, weights: Mixing | None, spans: Spans
    ) -> tuple[Tensor, Mixing | None, Spans]:
        """The tokens of a slice, with their weights and spans."""
        return streams[part], weights and Mixing(*(w[part] for w in weights)), spans.select(part)

    def attend(self, text: tuple[Tensor, ...], latent: tuple[Tensor, ...], last: bool) -> tuple[Tensor, Tensor]:
        """Attention within rows: queries, keys and values of text, [T, h, d] each, and of latents, [R, h, d] each.

        Returns outputs [.., h * d] of text and latents; in the last block, whose text queries are only those that a head reads, of those.
        """
        padding, groups = (self.padding, self.heads) if last else (self.whole, [("text", "latent")])
        rows = len(padding.lengths)
        side = 1 if self.row_by_row else rows  # rows that go through the kernel side by side
        sizes = padding.lengths * len(groups) if self.row_by_row else [sum(padding.lengths)] * len(groups)
        read = [groups[part * side // rows] for part in range(len(sizes))]
        text_q = iter(text[0].split([size for size, heads in zip(sizes, read, strict=True) if "text" in heads]))
        keys_and_values = zip(*(x.split(sizes) for x in text[1:]), *(x.split(side) for x in latent), read, strict=True)
        key_mask = None if self.key_mask is None else self.key_mask[:rows]
        outputs: tuple[list[Tensor], list[Tensor]] = ([], [])

        def joined(of_text: Tensor | None, of_latent: Tensor | None) -> Tensor:
            """Rows [.., h, n, d] of the text's tokens with the latent behind them, or of one of the two."""
            parts = [] if of_text is None else [of_text[None] if self.row_by_row else padding.unpack(of_text)]
            return _cat(parts + ([] if of_latent is None else [of_latent[:, None]]), dim=1).transpose(1, 2)

        for text_k, text_v, latent_q, latent_k, latent_v, heads in keys_and_values:
            q = joined(next(text_q) if "text" in heads else None, latent_q if "latent" in heads else None)
            out = F.scaled_dot_product_attention(
                q, joined(text_k, latent_k), joined(text_v, latent_v), attn_mask=key_mask
            )
            out = out.transpose(1, 2).flatten(2)
            if "text" in heads:
                of_text = out[:, :-1] if "latent" in heads else out
                outputs[0].append(of_text[0] if self.row_by_row else padding.pack(of_text))
            if "latent" in heads:
                outputs[1].append(out[:, -1].contiguous())  # strided, it would be compiled for once more
        nothing = text[1].new_empty(0, text[1].shape[1] * text[1].shape[2])
        return _cat(outputs[0] or [nothing]), _cat(outputs[1] or [nothing])


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)  # torch.cat copies a single tensor too

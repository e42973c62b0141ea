"""Ragged rows that attend end to end: every row's latent behind its text, [T + R, ...], and no padding."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from job.model import flash4
from job.model.flash4 import flash4_serves
from job.model.groups import Padding

HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None  # not before PyTorch 2.10


@dataclass(frozen=True)
class EndToEnd:
    """Where R rows lie end to end, each row's latent behind its text: [T + R, ...]."""

    text_at: Tensor  # [T]
    latent_at: Tensor  # [R]

    @classmethod
    def of(cls, padding: Padding) -> EndToEnd:
        """The places of ragged rows, computed on the device."""
        rows, seq_len = padding.mask.shape
        row = torch.arange(rows, device=padding.mask.device)
        row_of_token = padding.pack(row[:, None].expand(-1, seq_len))
        token = torch.arange(len(row_of_token), device=row.device)
        return cls(token + row_of_token, padding.mask.sum(1).cumsum(0) + row)

    def join(self, text: Tensor, latent: Tensor) -> Tensor:
        """Values of texts [T, ...] and of latents [R, ...] in one."""
        return _Join.apply(text, latent, self.text_at, self.latent_at)

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The other way: values of texts and of latents."""
        return _Part.apply(x, self.text_at, self.latent_at)


class _Join(torch.autograd.Function):
    """x with x[text_at] = text and x[latent_at] = latent.

    No place is written twice, which indexing's own gradient cannot know: on a GPU it sorts the places first.
    """

    @staticmethod
    def forward(ctx: Any, text: Tensor, latent: Tensor, text_at: Tensor, latent_at: Tensor) -> Tensor:
        ctx.save_for_backward(text_at, latent_at)
        x = text.new_empty(len(text) + len(latent), *text.shape[1:])
        return x.index_copy_(0, text_at, text).index_copy_(0, latent_at, latent)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        text_at, latent_at = ctx.saved_tensors
        return gradient.index_select(0, text_at), gradient.index_select(0, latent_at), None, None


class _Part(torch.autograd.Function):
    """x[text_at] and x[latent_at]: what _Join does, backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, text_at: Tensor, latent_at: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(text_at, latent_at)
        return x.index_select(0, text_at), x.index_select(0, latent_at)

    @staticmethod
    def backward(ctx: Any, to_text: Tensor, to_latent: Tensor) -> tuple[Tensor, None, None]:
        text_at, latent_at = ctx.saved_tensors
        gradient = to_text.new_empty(len(to_text) + len(to_latent), *to_text.shape[1:])
        return gradient.index_copy_(0, text_at, to_text).index_copy_(0, latent_at, to_latent), None, None


@dataclass(frozen=True)
class Ends:
    """Lengths of consecutive rows, on the host and, as the places where they end, on the device."""

    lengths: list[int]
    places: Tensor  # [R + 1] int32: 0, then the end of each row

    @classmethod
    def of(cls, lengths: list[int], on_device: Tensor) -> Ends:
        """Of the same lengths, twice."""
        return cls(lengths, F.pad(on_device.cumsum(0), (1, 0)).int())


def attend_end_to_end(q: Tensor, k: Tensor, v: Tensor, asking: Ends, given: Ends) -> Tensor:
    """Attention within rows that lie end to end: queries [Q, h, d], keys and values [K, h, d]; returns [Q, h, d]."""
    if q.is_cuda:
        ends = (asking.places, given.places, max(asking.lengths), max(given.lengths))
        if flash4_serves(q):
            return flash4.attend(q, k, v, *ends)
        from torch.nn.attention.varlen import varlen_attn  # here: it loads PyTorch's compiler, a second

        out = varlen_attn(q, k, v, *ends)
        assert isinstance(out, Tensor)  # a pair only where more is asked for
        return out
    split = (q.split(asking.lengths), k.split(given.lengths), v.split(given.lengths))
    rows = zip(*([x.transpose(0, 1)[None] for x in parts] for parts in split), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*row)[0].transpose(0, 1) for row in rows])


def has_varlen_kernel(x: Tensor) -> bool:
    """Whether a GPU attends to rows end to end for heads [.., h, d] like these."""
    return flash4_serves(x) or (
        HAS_VARLEN
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[-1] % 8 == 0
        and x.shape[-1] <= 256
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )

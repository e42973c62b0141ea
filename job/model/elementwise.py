"""What lies between matrix products and belongs to single elements, in one pass over memory by Triton kernels on a GPU.

PyTorch adds up a bias' gradient in a pass of its own, and adds bf16 to float32 at less than half the memory's rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from job.model.sublayer import ceil_div

ROWS, COLUMNS = 4, 512  # of a tile
ADDED = 4096  # elements of a program that adds


def biased_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) [N, H] of x's type, for x [N, H] and bias [H] (the exact GELU of Hendrycks & Gimpel 2016)."""
    return _BiasedGelu.apply(x.contiguous(), bias)


class _BiasedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        from job.model.elementwise_kernels import biased_gelu_forward

        ctx.save_for_backward(x, bias)
        n_rows, width = x.shape
        out = torch.empty_like(x)
        if n_rows:
            biased_gelu_forward[(ceil_div(n_rows, ROWS), ceil_div(width, COLUMNS))](
                x, bias, out, n_rows, H=width, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=4
            )
        return out

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor, Tensor]:
        from job.model.elementwise_kernels import biased_gelu_backward

        x, bias = ctx.saved_tensors
        n_rows, width = x.shape
        across = ceil_div(width, COLUMNS)
        chunk = ceil_div(ceil_div(n_rows, max(1, _programs(x.device) // across)), ROWS) * ROWS
        chunks = ceil_div(n_rows, max(1, chunk))
        to_x = torch.empty_like(x)
        parts = x.new_empty(chunks, width, dtype=torch.float32)
        if n_rows:
            biased_gelu_backward[(chunks, across)](
                *(to_out.contiguous(), x, bias, to_x, parts, n_rows, chunk),
                H=width,
                COLUMNS=COLUMNS,
                ROWS=ROWS,
                num_warps=4,
            )
        return to_x, parts.sum(0).to(bias.dtype)


def add_to(totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add to each of `totals` what stands at its place in `parts`, contiguous and of any types."""
    alike = [(total, part) for total, part in zip(totals, parts, strict=True) if total.dtype == part.dtype]
    if alike:
        torch._foreach_add_([total for total, _ in alike], [part for _, part in alike])
    for total, part in zip(totals, parts, strict=True):
        if total.dtype != part.dtype:
            from job.model.elementwise_kernels import add_kernel

            count = total.numel()
            add_kernel[(ceil_div(count, ADDED),)](total, part.contiguous(), count, BLOCK=ADDED, num_warps=8)


@cache
def _programs(device: torch.device) -> int:
    """Programs that a GPU holds at once; for another device, where Triton's interpreter runs, two."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2

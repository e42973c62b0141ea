"""Matrices in 8-bit floats, which recent GPUs can multiply at twice the rate of bf16.

e4m3 (Micikevicius et al. 2022) has 4 bits of exponent and 3 of mantissa, its largest number is 448. Each row of a
matrix is divided by a scale of its own, so that its largest element becomes 448; products are multiplied with the
scales of both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from job.model.sublayer import kernels_serve

TYPE = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 1e-30  # maximum of a row: rows of zeros are divided by a scale too


class Weight:
    """A weight [N, K] in 8-bit floats, for products with inputs [M, K] and with gradients [M, N].

    The products contract rows with rows, so it lies there in both directions. Gradients take the scales of its rows
    before they get their own: both directions hold the same numbers.
    """

    def __init__(self, weight: Tensor) -> None:
        self.rows, self.scales = quantize(weight.detach())
        self.columns = self.rows.T.contiguous()  # [K, N]
        self.ones = torch.ones_like(self.columns[:, :1], dtype=torch.float32)  # its scales

    def copy_(self, weight: Tensor) -> None:
        """Take the numbers of a weight, in the same memory."""
        rows, scales = quantize(weight.detach())
        self.rows.copy_(rows)
        self.scales.copy_(scales)
        self.columns.copy_(rows.T)

    def product(self, x: Tensor) -> Tensor:
        """x [M, K] @ weight.T [K, N] in bf16."""
        return _multiply(quantize(x), self.rows, self.scales)

    def product_with_gradient(self, gradient: Tensor) -> Tensor:
        """gradient [M, N] @ weight [N, K] in bf16."""
        return _multiply(quantize(gradient, self.scales), self.columns, self.ones)


def quantize(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K], times `factors` [K, 1] of its columns, in 8-bit floats, and the scales [M, 1] float32 of its rows.

    What is not finite makes NaN of its row's products, also where a scale would hide it.
    """
    if kernels_serve(x.device):
        return quantize_by_kernel(x, factors)
    wide = x.float() if factors is None else x.float() * factors.T
    scales = wide.abs().amax(1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (wide / scales).to(TYPE), scales


def quantize_by_kernel(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize` in one pass over memory."""
    from job.model.float8_kernels import quantize_rows

    x = x.contiguous()
    n_rows, width = x.shape
    values, scales = torch.empty_like(x, dtype=TYPE), x.new_empty(n_rows, 1, dtype=torch.float32)
    columns = 1 << (width - 1).bit_length()
    if n_rows:
        quantize_rows[(n_rows,)](
            *(x, factors, values, scales),
            K=width,
            COLUMNS=columns,
            LARGEST=LARGEST,
            SMALLEST=SMALLEST,
            num_warps=min(8, max(1, columns // 1024)),
        )
    return values, scales


def _multiply(x: tuple[Tensor, Tensor], weight: Tensor, scales: Tensor) -> Tensor:
    values, of_rows = x
    return F.scaled_mm(
        *(values, weight.T),
        *(of_rows, ScalingType.RowWise, scales.T, ScalingType.RowWise),
        output_dtype=torch.bfloat16,
        use_fast_accum=True,  # on Hopper GPUs sums then have 22 bits (pytorch #147971): far more than the factors
    )

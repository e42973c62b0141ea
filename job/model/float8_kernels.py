"""A Triton kernel that makes 8-bit floats; `job.model.float8` calls it."""

# Triton reads these functions' source; annotations other than tl.constexpr would be read as types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def quantize_rows(
    x,  # [M, K]
    factors,  # [K] float32 or None: of the columns
    values,  # out [M, K] float8
    scales,  # out [M] float32
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,  # of the format
    SMALLEST: tl.constexpr,  # of rows' maxima: of zeros it stands for the maximum
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    inside = column < K
    value = tl.load(x + row * K + column, inside, 0.0).to(tl.float32)
    if factors is not None:
        value *= tl.load(factors + column, inside, 0.0)
    scale = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST) / LARGEST
    tl.store(values + row * K + column, tl.div_rn(value, scale).to(values.dtype.element_ty), inside)
    tl.store(scales + row, scale)

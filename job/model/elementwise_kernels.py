"""Triton kernels of single elements; `job.model.elementwise` calls them."""

# Triton reads these functions' source; annotations other than tl.constexpr would be read as types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl

INVERSE_ROOT_2 = tl.constexpr(0.7071067811865476)
INVERSE_ROOT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _normal(x, EXACT: tl.constexpr):
    """Distribution function and density of the normal distribution at x."""
    density = INVERSE_ROOT_2_PI * tl.exp(-0.5 * x * x)
    if EXACT:
        return 0.5 + 0.5 * tl.erf(x * INVERSE_ROOT_2), density
    # Abramowitz & Stegun 1964, 26.2.17 (error below 7.5e-8), a fourth of erf's instructions: for outputs of 8 bits.
    t = 1 / (1 + 0.2316419 * tl.abs(x))
    tail = 1.781477937 + t * (-1.821255978 + t * 1.330274429)
    tail = density * t * (0.31938153 + t * (-0.356563782 + t * tail))
    return tl.where(x < 0, tail, 1 - tail), density


@triton.jit(do_not_specialize=["n_rows"])
def biased_gelu_forward(
    x,  # [N, H]
    bias,  # [H]
    out,  # out [N, H]
    n_rows,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n_rows)[:, None] & (column < H)[None, :]
    at = row[:, None] * H + column[None, :]
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    value += tl.load(bias + column, column < H, 0.0).to(tl.float32)[None, :]
    share, _ = _normal(value, x.dtype.element_ty == tl.float32)
    tl.store(out + at, (value * share).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["n_rows", "chunk"])
def biased_gelu_backward(
    to_out,  # [N, H]
    x,  # [N, H]
    bias,  # [H]
    to_x,  # out [N, H]
    parts,  # out [chunks, H] float32: of the bias, to be summed
    n_rows,
    chunk,  # rows of a program, a multiple of ROWS
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, n_rows)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < H
    shift = tl.load(bias + column, is_column, 0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(start, end, ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < end)[:, None] & is_column[None, :]
        at = row[:, None] * H + column[None, :]
        value = tl.load(x + at, inside, 0.0).to(tl.float32) + shift
        share, density = _normal(value, x.dtype.element_ty == tl.float32)
        slope = share + value * density
        gradient = tl.load(to_out + at, inside, 0.0).to(tl.float32) * slope
        tl.store(to_x + at, gradient.to(to_x.dtype.element_ty), inside)
        total += gradient
    tl.store(parts + tl.program_id(0).to(tl.int64) * H + column, tl.sum(total, 0), is_column)


@triton.jit
def add_kernel(total, part, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(total + at, inside, 0.0) + tl.load(part + at, inside, 0.0).to(total.dtype.element_ty)
    tl.store(total + at, value, inside)

"""Triton kernels of what attention takes: norms of queries and keys, written where each row lies among the others."""

# Triton reads these functions' source; annotations other than tl.constexpr would be read as types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl

from job.model.sublayer_kernels import sums2


@triton.jit
def _places(place, n_rows, n_heads, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """A program's rows of one head [rows, columns]: in [N, 3, h, d], among the joined ones, and which are there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    is_row = row < n_rows
    of_head = tl.program_id(1) * D + column
    given = row[:, None] * (3 * n_heads * D) + of_head
    joined = tl.load(place + row, is_row, 0)[:, None] * (n_heads * D) + of_head
    return given, joined, is_row[:, None] & (column < D)


@triton.jit
def _load_gains(gains, width, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Gains of a head's queries and keys, [1, columns] each."""
    column = tl.arange(0, COLUMNS)[None, :]
    of_head = gains + tl.program_id(1) * D + column
    return tl.load(of_head, column < D, 0.0), tl.load(of_head + width, column < D, 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def heads_forward(
    qkv,  # [N, 3, h, d]
    gains,  # [2, h, d] float32: of queries and of keys
    place,  # [N] int64: where each row lies among the joined ones
    q,  # out [M, h, d], and so k and v
    k,
    v,
    n_rows,
    n_heads,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
):
    given, joined, inside = _places(place, n_rows, n_heads, D, COLUMNS, ROWS)
    width = n_heads * D
    query = tl.load(qkv + given, inside, 0.0)
    key = tl.load(qkv + given + width, inside, 0.0)
    if NORM:
        query_gain, key_gain = _load_gains(gains, width, D, COLUMNS)
        query, key = query.to(tl.float32), key.to(tl.float32)
        query_square, key_square = sums2(query * query, key * key)
        query *= tl.rsqrt(tl.maximum(query_square, 1e-24))[:, None] * query_gain
        key *= tl.rsqrt(tl.maximum(key_square, 1e-24))[:, None] * key_gain
    tl.store(q + joined, query.to(q.dtype.element_ty), inside)
    tl.store(k + joined, key.to(k.dtype.element_ty), inside)
    tl.store(v + joined, tl.load(qkv + given + 2 * width, inside, 0.0), inside)


@triton.jit
def norm_backward(gradient, x, gain):
    """Gradients of x / |x| * gain [rows, columns], and of the gain before its sum over rows."""
    square, along = sums2(x * x, gradient * gain * x)
    inverse = tl.rsqrt(tl.maximum(square, 1e-24))
    unit = x * inverse[:, None]
    return inverse[:, None] * (gradient * gain - unit * (along * inverse)[:, None]), gradient * unit


@triton.jit(do_not_specialize=["n_rows"])
def heads_backward(
    to_q,
    to_k,
    to_v,
    qkv,
    gains,
    place,
    to_qkv,  # out [N, 3, h, d]
    gain_parts,  # out [programs, 2, h, d] float32, to be summed
    n_rows,
    n_heads,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
):
    given, joined, inside = _places(place, n_rows, n_heads, D, COLUMNS, ROWS)
    width = n_heads * D
    query = tl.load(to_q + joined, inside, 0.0)
    key = tl.load(to_k + joined, inside, 0.0)
    if NORM:
        query_gain, key_gain = _load_gains(gains, width, D, COLUMNS)
        query_given = tl.load(qkv + given, inside, 0.0).to(tl.float32)
        key_given = tl.load(qkv + given + width, inside, 0.0).to(tl.float32)
        query, of_query = norm_backward(query.to(tl.float32), query_given, query_gain)
        key, of_key = norm_backward(key.to(tl.float32), key_given, key_gain)
        column = tl.arange(0, COLUMNS)
        of_parts = gain_parts + tl.program_id(0).to(tl.int64) * (2 * width) + tl.program_id(1) * D + column
        tl.store(of_parts, tl.sum(of_query, 0), column < D)
        tl.store(of_parts + width, tl.sum(of_key, 0), column < D)
    tl.store(to_qkv + given, query.to(to_qkv.dtype.element_ty), inside)
    tl.store(to_qkv + given + width, key.to(to_qkv.dtype.element_ty), inside)
    tl.store(to_qkv + given + 2 * width, tl.load(to_v + joined, inside, 0.0), inside)

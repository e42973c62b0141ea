"""Triton kernels of a sublayer's two residual streams; `job.model.sublayer` calls them.

Forward a program takes a few whole rows (tokens), backward those of one segment, which share a condition; both pass
over memory once. What several programs add up is written by each into a place of its own and summed afterwards, so that
a step gives the same bits every time; atomic sums would not. Sums over a row are taken together where they can be: it
is for one another that a row's threads wait longest.
"""

# Triton reads these functions' source; annotations other than tl.constexpr would be read as types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.runtime import driver


def shared_memory(device: int) -> int:
    """Bytes of shared memory that a program may have."""
    return driver.active.utils.get_device_properties(device)["max_shared_mem"]


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def sums2(a, b):
    """Row sums of two tiles [rows, columns] in one reduction."""
    return tl.reduce((a, b), 1, _add2)


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _add8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _add12(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11):
    return (
        a0 + b0,
        a1 + b1,
        a2 + b2,
        a3 + b3,
        a4 + b4,
        a5 + b5,
        a6 + b6,
        a7 + b7,
        a8 + b8,
        a9 + b9,
        a10 + b10,
        a11 + b11,
    )


@triton.jit
def _load3(at, is_row):
    """Three numbers of each row, which lie side by side."""
    return tl.load(at, is_row, 0.0), tl.load(at + 1, is_row, 0.0), tl.load(at + 2, is_row, 0.0)


@triton.jit
def _load4(at, is_row):
    a, b, c = _load3(at, is_row)
    return a, b, c, tl.load(at + 3, is_row, 0.0)


@triton.jit
def _store3(at, is_row, a, b, c):
    tl.store(at, a, is_row)
    tl.store(at + 1, b, is_row)
    tl.store(at + 2, c, is_row)


@triton.jit
def _store4(at, is_row, a, b, c, d):
    _store3(at, is_row, a, b, c)
    tl.store(at + 3, d, is_row)


@triton.jit
def _weights_of_logits(a0, a1, a2, a3, b0, b1, b2, b3, bias):
    """Of both streams' projections: alphas, the share that a stream keeps of itself, and post weights."""
    across = a1 + tl.load(bias + 1) + b2 + tl.load(bias + 6) - a2 - tl.load(bias + 2) - b1 - tl.load(bias + 5)
    alpha_first, alpha_second = tl.sigmoid(a0 + tl.load(bias)), tl.sigmoid(b0 + tl.load(bias + 4))
    post_first, post_second = 2 * tl.sigmoid(a3 + tl.load(bias + 3)), 2 * tl.sigmoid(b3 + tl.load(bias + 7))
    return alpha_first, alpha_second, tl.sigmoid(across / 2), post_first, post_second


@triton.jit
def _columns(H: tl.constexpr, COLUMNS: tl.constexpr):
    """A row's columns [1, columns], and which of them there are.

    A thread takes four side by side of every tensor. Triton would choose by type, eight of bf16 but four of float32,
    and where a thread has eight columns of a row, change from one order to the other through shared memory: seventeen
    more barriers for a row of the backward kernel.
    """
    column = tl.max_contiguous(tl.arange(0, COLUMNS), 4)[None, :]
    return column, column < H


@triton.jit
def _segment(bounds, index, H: tl.constexpr, COLUMNS: tl.constexpr):
    """First row, end and condition of a program's segment, and its columns [1, columns]."""
    start, end = tl.load(bounds + tl.program_id(0)), tl.load(bounds + tl.program_id(0) + 1)
    condition = tl.load(index + start, start < end, 0)
    column, is_column = _columns(H, COLUMNS)
    return start, end, condition, column, is_column


@triton.jit
def _load_weights(weight, column, is_column, H: tl.constexpr):
    """Columns of alpha, two mixing logits and post, [1, columns] each."""
    w0 = tl.load(weight + column, is_column, 0.0)
    w1 = tl.load(weight + H + column, is_column, 0.0)
    w2 = tl.load(weight + 2 * H + column, is_column, 0.0)
    w3 = tl.load(weight + 3 * H + column, is_column, 0.0)
    return w0, w1, w2, w3


@triton.jit
def _write(first, second, y, keep, post_first, post_second):
    """Both streams after the scaled branch y was written, [rows, columns]."""
    moved = (1 - keep[:, None]) * (second - first)
    return first + moved + post_first[:, None] * y, second + post_second[:, None] * y - moved


@triton.jit(do_not_specialize=["n_rows"])
def sublayer_forward(
    streams,  # [N, 2, H] float32
    branch,  # [N, H]: what the last branch gave
    branch_bias,  # [H] or None: to be added to it
    gains,  # [C, H], rows `gains_stride` apart: its gain under each condition
    gains_stride,
    mixing,  # [N, 3] float32: share that a stream keeps of itself, weight of the branch in each stream
    index,  # [N] int64: condition of each row
    weight,  # [4, H] float32: of alpha, two mixing logits and post
    bias,  # [2, 4] float32
    modulation,  # [C, 2H], rows `modulation_stride` apart: gain and bias of the norm under each condition
    modulation_stride,
    written,  # out [N, 2, H] float32
    x,  # out [N, H]: what the next branch reads
    next_mixing,  # out [N, 3] float32
    stats,  # out [N, 12] float32, for the backward pass: 1/|stream| of both, mean, 1/deviation, alpha of both, and of
    #         each stream the projections of alpha, mixing (the difference of both) and post
    n_rows,
    eps,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WRITE: tl.constexpr,
    READ: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column, is_column = _columns(H, COLUMNS)
    is_row = row < n_rows
    inside = is_row[:, None] & is_column
    of_first = row[:, None] * (2 * H) + column
    of_row = row[:, None] * H + column
    condition = tl.load(index + row, is_row, 0)
    first = tl.load(streams + of_first, inside, 0.0)
    second = tl.load(streams + of_first + H, inside, 0.0)
    if WRITE:
        y = tl.load(branch + of_row, inside, 0.0).to(tl.float32)
        if branch_bias is not None:
            y += tl.load(branch_bias + column, is_column, 0.0).to(tl.float32)
        y *= tl.load(gains + condition[:, None] * gains_stride + column, inside, 0.0).to(tl.float32)
        first, second = _write(first, second, y, *_load3(mixing + row * 3, is_row))
        tl.store(written + of_first, first, inside)
        tl.store(written + of_first + H, second, inside)
    if READ:
        w0, w1, w2, w3 = _load_weights(weight, column, is_column, H)
        sums = (first, second, first * first, second * second)
        of_first_sums = (first * w0, first * w1, first * w2, first * w3)
        of_second_sums = (second * w0, second * w1, second * w2, second * w3)
        sum_first, sum_second, square_first, square_second, a0, a1, a2, a3, b0, b1, b2, b3 = tl.reduce(
            sums + of_first_sums + of_second_sums, 1, _add12
        )
        inverse_first = tl.rsqrt(tl.maximum(square_first, 1e-24))
        inverse_second = tl.rsqrt(tl.maximum(square_second, 1e-24))
        a0, a1, a2, a3 = a0 * inverse_first, a1 * inverse_first, a2 * inverse_first, a3 * inverse_first
        b0, b1, b2, b3 = b0 * inverse_second, b1 * inverse_second, b2 * inverse_second, b3 * inverse_second
        alpha_first, alpha_second, keep, post_first, post_second = _weights_of_logits(
            a0, a1, a2, a3, b0, b1, b2, b3, bias
        )
        _store3(next_mixing + row * 3, is_row, keep, post_first, post_second)
        mixed = alpha_first[:, None] * first + alpha_second[:, None] * second
        mean = (alpha_first * sum_first + alpha_second * sum_second) / H
        centered = tl.where(is_column, mixed - mean[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(centered * centered, 1) / H + eps)
        of_condition = modulation + condition[:, None] * modulation_stride + column
        gain = tl.load(of_condition, inside, 0.0).to(tl.float32)
        shift = tl.load(of_condition + H, inside, 0.0).to(tl.float32)
        tl.store(x + of_row, (centered * inverse[:, None] * gain + shift).to(x.dtype.element_ty), inside)
        _store4(stats + row * 12, is_row, inverse_first, inverse_second, mean, inverse)
        _store4(stats + row * 12 + 4, is_row, alpha_first, alpha_second, a0, a1 - a2)
        _store4(stats + row * 12 + 8, is_row, a3, b0, b1 - b2, b3)


@triton.jit
def _read_backward(
    to_first,
    to_second,
    to_next_mixing,
    to_x,
    first,
    second,
    gain,
    w0,
    w1,
    w3,
    next_mixing,
    stats,
    row,
    inside,
    is_row,
    H: tl.constexpr,
):
    """Gradients of both streams with those that come through what was read of them, of the norm's gain, and of the
    weights' columns of alpha, mixing and post, all [rows, columns]; and of the logits of alpha, mixing and post of the
    first stream, of alpha and post of the second, [rows].

    to_first and to_second [rows, columns] are the streams' gradients so far, to_x is that of what was read. w1 is the
    difference of both mixing columns.
    """
    inverse_first, inverse_second, mean, inverse = _load4(stats + row * 12, is_row)
    alpha_first, alpha_second, a0, a1 = _load4(stats + row * 12 + 4, is_row)
    a3, b0, b1, b3 = _load4(stats + row * 12 + 8, is_row)
    keep, post_first, post_second = _load3(next_mixing + row * 3, is_row)
    mixed = alpha_first[:, None] * first + alpha_second[:, None] * second
    normed = tl.where(inside, (mixed - mean[:, None]) * inverse[:, None], 0.0)
    to_normed = to_x * gain
    # The gradient of what was mixed is inverse * (to_normed - of_mean - normed * of_deviation). Its products with the
    # streams follow from those of its parts, without a second round of sums.
    sums = (to_normed, to_normed * normed, first, second)
    products = (to_normed * first, to_normed * second, normed * first, normed * second)
    of_mean, of_deviation, sum_first, sum_second, to_a0, to_b0, along_a, along_b = tl.reduce(sums + products, 1, _add8)
    of_mean, of_deviation = of_mean / H, of_deviation / H
    to_a0 = inverse * (to_a0 - of_mean * sum_first - of_deviation * along_a)
    to_b0 = inverse * (to_b0 - of_mean * sum_second - of_deviation * along_b)
    to_mixed = inverse[:, None] * (to_normed - of_mean[:, None] - normed * of_deviation[:, None])
    to_mixed = tl.where(inside, to_mixed, 0.0)
    to_a0 *= alpha_first * (1 - alpha_first)
    to_b0 *= alpha_second * (1 - alpha_second)
    to_across, to_a3, to_b3 = _load3(to_next_mixing + row * 3, is_row)
    to_across *= keep * (1 - keep) / 2
    to_a3 *= post_first * (1 - post_first / 2)
    to_b3 *= post_second * (1 - post_second / 2)
    # The norm takes away the part of the gradient that lies along the stream.
    along_first = (to_a0 * a0 + to_across * a1 + to_a3 * a3) * inverse_first * inverse_first
    along_second = (to_b0 * b0 + to_b3 * b3 - to_across * b1) * inverse_second * inverse_second
    by_a0, by_a1, by_a3 = to_a0 * inverse_first, to_across * inverse_first, to_a3 * inverse_first
    by_b0, by_b2, by_b3 = to_b0 * inverse_second, to_across * inverse_second, to_b3 * inverse_second
    by_a0, by_a1, by_a3 = by_a0[:, None], by_a1[:, None], by_a3[:, None]
    by_b0, by_b2, by_b3 = by_b0[:, None], by_b2[:, None], by_b3[:, None]
    to_first += alpha_first[:, None] * to_mixed + by_a0 * w0 + by_a1 * w1 + by_a3 * w3 - along_first[:, None] * first
    to_second += alpha_second[:, None] * to_mixed + by_b0 * w0 - by_b2 * w1 + by_b3 * w3
    to_second -= along_second[:, None] * second
    to_w0 = by_a0 * first + by_b0 * second
    to_w1 = by_a1 * first - by_b2 * second
    to_w3 = by_a3 * first + by_b3 * second
    return to_first, to_second, to_x * normed, to_w0, to_w1, to_w3, to_a0, to_across, to_a3, to_b0, to_b3


@triton.jit
def _write_backward(
    to_first,
    to_second,
    difference,
    y,
    gain,
    keep,
    post_first,
    post_second,
    to_branch,
    to_mixing,
    row,
    is_row,
    inside,
):
    """Gradients of both streams before they were written, and of the scaled branch; all [rows, columns].

    Stores those of the branch's output and of the mixing. difference is the first stream less the second, before.
    """
    scaled = y * gain
    to_keep, to_post_first, to_post_second = tl.reduce(
        ((to_first - to_second) * difference, to_first * scaled, to_second * scaled), 1, _add3
    )
    _store3(to_mixing + row * 3, is_row, to_keep, to_post_first, to_post_second)
    to_scaled = post_first[:, None] * to_first + post_second[:, None] * to_second
    tl.store(to_branch, (to_scaled * gain).to(to_branch.dtype.element_ty), inside)
    moved = (1 - keep[:, None]) * (to_second - to_first)
    return to_first + moved, to_second - moved, to_scaled


@triton.jit
def _store_sum(at, x, is_column):
    tl.store(at, tl.sum(x, 0)[None, :], is_column)


@triton.jit
def _store_sums_of_logits(logit_parts, to_a0, to_across, to_a3, to_b0, to_b3):
    """Sums over rows, where the logits of both streams' alpha, two of mixing, and post lie."""
    of_logits = logit_parts + tl.program_id(0).to(tl.int64) * 8
    across = tl.sum(to_across, 0)
    tl.store(of_logits, tl.sum(to_a0, 0))
    tl.store(of_logits + 1, across)
    tl.store(of_logits + 2, -across)
    tl.store(of_logits + 3, tl.sum(to_a3, 0))
    tl.store(of_logits + 4, tl.sum(to_b0, 0))
    tl.store(of_logits + 5, -across)
    tl.store(of_logits + 6, across)
    tl.store(of_logits + 7, tl.sum(to_b3, 0))


@triton.jit
def sublayer_backward(
    to_written,  # [N, 2, H] float32: gradient of the streams that were written (or read)
    to_x,  # [N, H]: gradient of what the next branch read
    to_next_mixing,  # [N, 3] float32
    streams,  # as given to the forward pass
    branch,
    branch_bias,
    gains,
    gains_stride,
    mixing,
    index,
    bounds,
    weight,
    modulation,
    modulation_stride,
    next_mixing,
    stats,
    to_streams,  # out [N, 2, H] float32
    to_branch,  # out [N, H]
    to_mixing,  # out [N, 3] float32
    parts,  # out [programs, 7, H] float32, to be summed: of the norm's gain and bias, of the branch's gain and bias, of
    #         the weights of alpha, of mixing (of the first logit; the second's is its negative) and of post
    logit_parts,  # out [programs, 8] float32, to be summed: of `bias`
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    WRITE: tl.constexpr,
    READ: tl.constexpr,
):
    start, end, condition, column, is_column = _segment(bounds, index, H, COLUMNS)
    nothing = tl.zeros([ROWS, COLUMNS], tl.float32)
    to_gain, to_shift, to_gains, to_scaled = nothing, nothing, nothing, nothing
    to_w0, to_w1, to_w3 = nothing, nothing, nothing
    none = tl.zeros([ROWS], tl.float32)
    to_a0, to_across, to_a3, to_b0, to_b3 = none, none, none, none, none
    if WRITE:
        branch_gain = tl.load(gains + condition * gains_stride + column, is_column, 0.0).to(tl.float32)
        if branch_bias is not None:
            shift_of_branch = tl.load(branch_bias + column, is_column, 0.0).to(tl.float32)
    if READ:
        w0, w1, w2, w3 = _load_weights(weight, column, is_column, H)
        w1 -= w2
        gain = tl.load(modulation + condition * modulation_stride + column, is_column, 0.0).to(tl.float32)
    for begin in tl.range(start, end, ROWS, num_stages=STAGES):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)
        is_row = row < end
        inside = is_row[:, None] & is_column
        of_first = row[:, None] * (2 * H) + column
        of_row = row[:, None] * H + column
        to_first = tl.load(to_written + of_first, inside, 0.0)
        to_second = tl.load(to_written + of_first + H, inside, 0.0)
        first = tl.load(streams + of_first, inside, 0.0)
        second = tl.load(streams + of_first + H, inside, 0.0)
        if WRITE:
            difference = first - second
            y = tl.load(branch + of_row, inside, 0.0).to(tl.float32)
            if branch_bias is not None:
                y += shift_of_branch
            keep, post_first, post_second = _load3(mixing + row * 3, is_row)
            # To write the streams once more takes less time than to read what was written.
            first, second = _write(first, second, y * branch_gain, keep, post_first, post_second)
        if READ:
            to_read = tl.load(to_x + of_row, inside, 0.0).to(tl.float32)
            to_first, to_second, row_gain, row_w0, row_w1, row_w3, row_a0, row_across, row_a3, row_b0, row_b3 = (
                _read_backward(
                    to_first,
                    to_second,
                    to_next_mixing,
                    to_read,
                    first,
                    second,
                    gain,
                    w0,
                    w1,
                    w3,
                    next_mixing,
                    stats,
                    row,
                    inside,
                    is_row,
                    H,
                )
            )
            to_gain += row_gain
            to_shift += to_read
            to_w0 += row_w0
            to_w1 += row_w1
            to_w3 += row_w3
            to_a0 += row_a0
            to_across += row_across
            to_a3 += row_a3
            to_b0 += row_b0
            to_b3 += row_b3
        if WRITE:
            to_first, to_second, row_scaled = _write_backward(
                to_first,
                to_second,
                difference,
                y,
                branch_gain,
                keep,
                post_first,
                post_second,
                to_branch + of_row,
                to_mixing,
                row,
                is_row,
                inside,
            )
            to_scaled += row_scaled
            to_gains += row_scaled * y
        tl.store(to_streams + of_first, to_first, inside)
        tl.store(to_streams + of_first + H, to_second, inside)
    of_parts = parts + tl.program_id(0).to(tl.int64) * (7 * H) + column
    if READ:
        _store_sum(of_parts, to_gain, is_column)
        _store_sum(of_parts + H, to_shift, is_column)
        _store_sum(of_parts + 4 * H, to_w0, is_column)
        _store_sum(of_parts + 5 * H, to_w1, is_column)
        _store_sum(of_parts + 6 * H, to_w3, is_column)
        _store_sums_of_logits(logit_parts, to_a0, to_across, to_a3, to_b0, to_b3)
    if WRITE:
        _store_sum(of_parts + 2 * H, to_gains, is_column)
        _store_sum(of_parts + 3 * H, to_scaled * branch_gain, is_column)


@triton.jit
def _sum_of_segments(at, stride, start, end, is_column, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums [columns] over the segments from start to end of what lies `stride` apart at pointers `at` [columns]."""
    total = tl.zeros([SEGMENTS, COLUMNS], tl.float32)
    for begin in range(start, end, SEGMENTS):
        segment = begin + tl.arange(0, SEGMENTS)
        of_segment = at[None, :] + (segment.to(tl.int64) * stride)[:, None]
        total += tl.load(of_segment, (segment < end)[:, None] & is_column[None, :], 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["conditions", "n_segments"])
def sum_parts(
    parts,  # [segments, 7, H] and
    logit_parts,  # [segments, 8], as the backward pass left them
    first_segments,  # [C + 1] int32: where the segments of each condition begin, and after the last
    conditions,
    n_segments,
    to_modulation,  # out [C, 2H]
    to_gains,  # out [C, H]
    to_branch_bias,  # out [H] or None
    to_weight,  # out [4, H]
    to_bias,  # out [8]
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WRITE: tl.constexpr,
    READ: tl.constexpr,
):
    """A program sums some columns of what belongs to one condition, or of one row of what all conditions share.

    The shared rows are sums over all segments: one program for all of them would be the last to end.
    """
    condition = tl.program_id(0).to(tl.int64)
    shared = tl.program_id(0) - conditions
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < H
    at = parts + column
    if shared < 0:
        start, end = tl.load(first_segments + condition), tl.load(first_segments + condition + 1)
        if READ:
            to_gain = _sum_of_segments(at, 7 * H, start, end, is_column, SEGMENTS, COLUMNS)
            to_shift = _sum_of_segments(at + H, 7 * H, start, end, is_column, SEGMENTS, COLUMNS)
            of_condition = to_modulation + condition * (2 * H) + column
            tl.store(of_condition, to_gain.to(to_modulation.dtype.element_ty), is_column)
            tl.store(of_condition + H, to_shift.to(to_modulation.dtype.element_ty), is_column)
        if WRITE:
            of_gains = _sum_of_segments(at + 2 * H, 7 * H, start, end, is_column, SEGMENTS, COLUMNS)
            tl.store(to_gains + condition * H + column, of_gains.to(to_gains.dtype.element_ty), is_column)
    elif shared == 0:
        if WRITE and to_branch_bias is not None:
            to_shift = _sum_of_segments(at + 3 * H, 7 * H, 0, n_segments, is_column, SEGMENTS, COLUMNS)
            tl.store(to_branch_bias + column, to_shift.to(to_branch_bias.dtype.element_ty), is_column)
        if READ and tl.program_id(1) == 0:
            logit = tl.arange(0, 8)
            of_logits = _sum_of_segments(logit_parts + logit, 8, 0, n_segments, logit < 8, SEGMENTS, 8)
            tl.store(to_bias + logit, of_logits)
    elif READ:
        to_column = _sum_of_segments(at + (3 + shared) * H, 7 * H, 0, n_segments, is_column, SEGMENTS, COLUMNS)
        if shared == 1:
            tl.store(to_weight + column, to_column, is_column)
        elif shared == 2:
            tl.store(to_weight + H + column, to_column, is_column)
            tl.store(to_weight + 2 * H + column, -to_column, is_column)
        else:
            tl.store(to_weight + 3 * H + column, to_column, is_column)

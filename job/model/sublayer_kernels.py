"""Triton kernels of a sublayer's two residual streams; `job.model.sublayer` calls them.

A program takes a few whole rows (tokens) and passes over memory once. What several programs add up is written by each
into a place of its own and summed afterwards, so that a step gives the same bits every time; atomic sums would not.
"""

# Triton reads these functions' source; annotations other than tl.constexpr would be read as types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def sums2(a, b):
    """Row sums of two tiles [rows, columns] in one reduction: its waiting is most of what a reduction costs."""
    return tl.reduce((a, b), 1, _add2)


@triton.jit
def _add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _sums3(a, b, c):
    return tl.reduce((a, b, c), 1, _add3)


@triton.jit
def _add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _sums4(a, b, c, d):
    return tl.reduce((a, b, c, d), 1, _add4)


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


@triton.jit(do_not_specialize=["n_rows"])
def sublayer_forward(
    streams,  # [N, 2, H] float32
    branch,  # [N, H]: what the last branch gave
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
    stats,  # out [N, 12] float32: 1/|stream| of both, mean, 1/deviation, eight projections; for the backward pass
    n_rows,
    eps,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WRITE: tl.constexpr,
    READ: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    is_row, is_column = row < n_rows, column < H
    inside = is_row[:, None] & is_column[None, :]
    of_first = row[:, None] * (2 * H) + column[None, :]
    of_row = row[:, None] * H + column[None, :]
    condition = tl.load(index + row, is_row, 0)
    first = tl.load(streams + of_first, inside, 0.0)
    second = tl.load(streams + of_first + H, inside, 0.0)
    if WRITE:
        y = tl.load(branch + of_row, inside, 0.0).to(tl.float32)
        y *= tl.load(gains + condition[:, None] * gains_stride + column[None, :], inside, 0.0).to(tl.float32)
        keep, post_first, post_second = _load3(mixing + row * 3, is_row)
        moved = (1 - keep[:, None]) * (second - first)
        first += moved + post_first[:, None] * y
        second += post_second[:, None] * y - moved
        tl.store(written + of_first, first, inside)
        tl.store(written + of_first + H, second, inside)
    if READ:
        w0 = tl.load(weight + column, is_column, 0.0)[None, :]
        w1 = tl.load(weight + H + column, is_column, 0.0)[None, :]
        w2 = tl.load(weight + 2 * H + column, is_column, 0.0)[None, :]
        w3 = tl.load(weight + 3 * H + column, is_column, 0.0)[None, :]
        square_first, square_second = sums2(first * first, second * second)
        a0, a1, a2, a3 = _sums4(first * w0, first * w1, first * w2, first * w3)
        b0, b1, b2, b3 = _sums4(second * w0, second * w1, second * w2, second * w3)
        inverse_first = tl.rsqrt(tl.maximum(square_first, 1e-24))
        inverse_second = tl.rsqrt(tl.maximum(square_second, 1e-24))
        a0, a1, a2, a3 = a0 * inverse_first, a1 * inverse_first, a2 * inverse_first, a3 * inverse_first
        b0, b1, b2, b3 = b0 * inverse_second, b1 * inverse_second, b2 * inverse_second, b3 * inverse_second
        alpha_first, alpha_second, keep, post_first, post_second = _weights_of_logits(
            a0, a1, a2, a3, b0, b1, b2, b3, bias
        )
        _store3(next_mixing + row * 3, is_row, keep, post_first, post_second)
        mixed = alpha_first[:, None] * first + alpha_second[:, None] * second
        mean = tl.sum(mixed, 1) / H
        centered = tl.where(is_column[None, :], mixed - mean[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(centered * centered, 1) / H + eps)
        of_condition = condition[:, None] * modulation_stride + column[None, :]
        gain = tl.load(modulation + of_condition, inside, 0.0).to(tl.float32)
        shift = tl.load(modulation + of_condition + H, inside, 0.0).to(tl.float32)
        tl.store(x + of_row, (centered * inverse[:, None] * gain + shift).to(x.dtype.element_ty), inside)
        _store4(stats + row * 12, is_row, inverse_first, inverse_second, mean, inverse)
        _store4(stats + row * 12 + 4, is_row, a0, a1, a2, a3)
        _store4(stats + row * 12 + 8, is_row, b0, b1, b2, b3)


@triton.jit
def _read_backward(
    to_first,
    to_second,
    to_next_mixing,
    to_x,
    first,
    second,
    gain,
    weight,
    bias,
    stats,
    to_logits,
    row,
    column,
    inside,
    is_row,
    H: tl.constexpr,
):
    """Gradients of both streams with those that come through what was read of them, of the norm's gain, and of the
    weights' columns of alpha, mixing and post; all [rows, columns]. Stores the logits' gradient.

    to_first and to_second [rows, columns] are the streams' gradients so far, to_x is that of what was read.
    """
    is_column = column < H
    inverse_first, inverse_second, mean, inverse = _load4(stats + row * 12, is_row)
    a0, a1, a2, a3 = _load4(stats + row * 12 + 4, is_row)
    b0, b1, b2, b3 = _load4(stats + row * 12 + 8, is_row)
    alpha_first, alpha_second, keep, post_first, post_second = _weights_of_logits(a0, a1, a2, a3, b0, b1, b2, b3, bias)
    mixed = alpha_first[:, None] * first + alpha_second[:, None] * second
    normed = tl.where(inside, (mixed - mean[:, None]) * inverse[:, None], 0.0)
    to_normed = to_x * gain
    of_mean, of_deviation = sums2(to_normed, to_normed * normed)
    to_mixed = inverse[:, None] * (to_normed - of_mean[:, None] / H - normed * (of_deviation[:, None] / H))
    to_mixed = tl.where(inside, to_mixed, 0.0)
    to_a0, to_b0 = sums2(to_mixed * first, to_mixed * second)
    to_a0 *= alpha_first * (1 - alpha_first)
    to_b0 *= alpha_second * (1 - alpha_second)
    to_across, to_a3, to_b3 = _load3(to_next_mixing + row * 3, is_row)
    to_across *= keep * (1 - keep) / 2
    to_a3 *= post_first * (1 - post_first / 2)
    to_b3 *= post_second * (1 - post_second / 2)
    _store4(to_logits + row * 8, is_row, to_a0, to_across, -to_across, to_a3)
    _store4(to_logits + row * 8 + 4, is_row, to_b0, -to_across, to_across, to_b3)
    # The norm takes away the part of the gradient that lies along the stream.
    along_first = (to_a0 * a0 + to_across * (a1 - a2) + to_a3 * a3) * inverse_first * inverse_first
    along_second = (to_b0 * b0 + to_across * (b2 - b1) + to_b3 * b3) * inverse_second * inverse_second
    to_a0, to_a1, to_a3 = to_a0 * inverse_first, to_across * inverse_first, to_a3 * inverse_first
    to_b0, to_b2, to_b3 = to_b0 * inverse_second, to_across * inverse_second, to_b3 * inverse_second
    w0 = tl.load(weight + column, is_column, 0.0)[None, :]
    w1 = tl.load(weight + H + column, is_column, 0.0)[None, :]
    w1 -= tl.load(weight + 2 * H + column, is_column, 0.0)[None, :]
    w3 = tl.load(weight + 3 * H + column, is_column, 0.0)[None, :]
    to_first += alpha_first[:, None] * to_mixed + to_a0[:, None] * w0 + to_a1[:, None] * w1 + to_a3[:, None] * w3
    to_first -= along_first[:, None] * first
    to_second += alpha_second[:, None] * to_mixed + to_b0[:, None] * w0 - to_b2[:, None] * w1 + to_b3[:, None] * w3
    to_second -= along_second[:, None] * second
    to_w0 = to_a0[:, None] * first + to_b0[:, None] * second
    to_w1 = to_a1[:, None] * first - to_b2[:, None] * second
    to_w3 = to_a3[:, None] * first + to_b3[:, None] * second
    return to_first, to_second, to_x * normed, to_w0, to_w1, to_w3


@triton.jit
def _write_backward(to_first, to_second, difference, y, gain, mixing, to_branch, to_mixing, row, is_row, inside):
    """Gradients of both streams before they were written, and of the branch's gain; all [rows, columns].

    Stores those of the branch's output and of the mixing. difference is the first stream less the second, before.
    """
    keep, post_first, post_second = _load3(mixing + row * 3, is_row)
    scaled = y * gain
    to_keep, to_post_first, to_post_second = _sums3(
        (to_first - to_second) * difference, to_first * scaled, to_second * scaled
    )
    _store3(to_mixing + row * 3, is_row, to_keep, to_post_first, to_post_second)
    to_scaled = post_first[:, None] * to_first + post_second[:, None] * to_second
    tl.store(to_branch, (to_scaled * gain).to(to_branch.dtype.element_ty), inside)
    moved = (1 - keep[:, None]) * (to_second - to_first)
    return to_first + moved, to_second - moved, to_scaled * y


@triton.jit
def _flush(parts, owner, slot, condition, to_gain, to_shift, to_gains, column, H: tl.constexpr):
    """Sums over the rows of one condition, into the slot of this program and condition."""
    is_column = column < H
    at = parts + slot.to(tl.int64) * (3 * H) + column
    tl.store(at, tl.sum(to_gain, 0), is_column)
    tl.store(at + H, tl.sum(to_shift, 0), is_column)
    tl.store(at + 2 * H, tl.sum(to_gains, 0), is_column)
    tl.store(owner + slot, condition)


@triton.jit(do_not_specialize=["n_rows", "chunk"])
def sublayer_backward(
    to_written,  # [N, 2, H] float32: gradient of the streams that were written (or read)
    to_x,  # [N, H]: gradient of what the next branch read
    to_next_mixing,  # [N, 3] float32
    streams,  # as given to the forward pass
    branch,
    gains,
    gains_stride,
    mixing,
    index,
    weight,
    bias,
    modulation,
    modulation_stride,
    written,  # as the forward pass wrote them; the streams themselves where it wrote none
    stats,
    to_streams,  # out [N, 2, H] float32
    to_branch,  # out [N, H]
    to_mixing,  # out [N, 3] float32
    to_logits,  # out [N, 8] float32
    weight_parts,  # out [programs, 4, H] float32, to be summed
    parts,  # out [programs + C, 3, H] float32: of the norm's gain, its bias and the branch's gain, to be summed
    owner,  # out [programs + C] int32: which condition a slot of `parts` belongs to; -1 before: none
    n_rows,
    chunk,  # rows of a program, a multiple of ROWS
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WRITE: tl.constexpr,
    READ: tl.constexpr,
):
    program = tl.program_id(0)
    start = program * chunk
    end = tl.minimum(start + chunk, n_rows)
    column = tl.arange(0, COLUMNS)
    is_column = column < H
    nothing = tl.zeros([ROWS, COLUMNS], tl.float32)
    to_w0, to_w1, to_w3 = nothing, nothing, nothing
    to_gain, to_shift, to_gains = nothing, nothing, nothing
    current = tl.load(index + start)
    for begin in range(start, end, ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)
        is_row = row < end
        inside = is_row[:, None] & is_column[None, :]
        of_first = row[:, None] * (2 * H) + column[None, :]
        of_row = row[:, None] * H + column[None, :]
        condition = tl.load(index + row, is_row, -1)
        known = tl.maximum(condition, 0)[:, None]
        to_first = tl.load(to_written + of_first, inside, 0.0)
        to_second = tl.load(to_written + of_first + H, inside, 0.0)
        row_gain, row_shift, row_gains = nothing, nothing, nothing
        if READ:
            first = tl.load(written + of_first, inside, 0.0)
            second = tl.load(written + of_first + H, inside, 0.0)
            row_shift = tl.load(to_x + of_row, inside, 0.0).to(tl.float32)
            gain = tl.load(modulation + known * modulation_stride + column[None, :], inside, 0.0).to(tl.float32)
            to_first, to_second, row_gain, row_w0, row_w1, row_w3 = _read_backward(
                to_first,
                to_second,
                to_next_mixing,
                row_shift,
                first,
                second,
                gain,
                weight,
                bias,
                stats,
                to_logits,
                row,
                column,
                inside,
                is_row,
                H,
            )
            to_w0 += row_w0
            to_w1 += row_w1
            to_w3 += row_w3
        if WRITE:
            difference = tl.load(streams + of_first, inside, 0.0) - tl.load(streams + of_first + H, inside, 0.0)
            y = tl.load(branch + of_row, inside, 0.0).to(tl.float32)
            gain = tl.load(gains + known * gains_stride + column[None, :], inside, 0.0).to(tl.float32)
            to_first, to_second, row_gains = _write_backward(
                to_first, to_second, difference, y, gain, mixing, to_branch + of_row, to_mixing, row, is_row, inside
            )
        tl.store(to_streams + of_first, to_first, inside)
        tl.store(to_streams + of_first + H, to_second, inside)
        # Rows of one condition lie side by side, and conditions only rise; nearly always all rows here have `current`.
        lowest = tl.load(index + begin)
        highest = tl.load(index + tl.minimum(begin + ROWS, end) - 1)
        for here in range(lowest, highest + 1):
            if here != current:
                _flush(parts, owner, program + current, current, to_gain, to_shift, to_gains, column, H)
                to_gain, to_shift, to_gains = nothing, nothing, nothing
                current = here
            counts = (condition == here)[:, None]
            to_gain += tl.where(counts, row_gain, 0.0)
            to_shift += tl.where(counts, row_shift, 0.0)
            to_gains += tl.where(counts, row_gains, 0.0)
    # No other program has this sum of its number and a condition.
    _flush(parts, owner, program + current, current, to_gain, to_shift, to_gains, column, H)
    if READ:
        of_parts = weight_parts + program.to(tl.int64) * (4 * H) + column
        tl.store(of_parts, tl.sum(to_w0, 0), is_column)
        tl.store(of_parts + H, tl.sum(to_w1, 0), is_column)
        tl.store(of_parts + 2 * H, -tl.sum(to_w1, 0), is_column)
        tl.store(of_parts + 3 * H, tl.sum(to_w3, 0), is_column)

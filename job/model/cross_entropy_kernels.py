"""A Triton kernel of the cross-entropy and its gradient; `job.model.cross_entropy` calls it."""

# Triton reads these functions' source; annotations other than tl.constexpr would be read as types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32


@triton.jit
def _with_bias(logits, bias, at, is_row, column, W: tl.constexpr):
    """A tile [ROWS, COLUMNS] of logits + bias, -inf outside."""
    value = tl.load(logits + at, is_row[:, None] & (column < W)[None, :], float("-inf")).to(tl.float32)
    return value + tl.load(bias + column, column < W, 0.0)[None, :]


@triton.jit(do_not_specialize=["n_rows"])
def cross_entropy_rows(
    logits,  # [N, W], also out where GRADIENTS: the gradient of the weighted loss
    stride,  # elements from one row of logits to the next
    bias,  # [W] float32, -inf where no word is
    targets,  # [N] int64
    uniform,  # [N] or None: picked is the likeliest word
    weights,  # [N] or None: ones
    losses,  # out [N] float32: weighted
    picked,  # out [N] int64 or None
    n_rows,
    W: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    GRADIENTS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = row < n_rows
    start_of_row = (row * stride)[:, None]
    offset = tl.arange(0, COLUMNS)
    target = tl.load(targets + row, is_row, 0).to(tl.int32)
    # A target that is no word makes the loss NaN; a GPU would read whatever lies there.
    is_target = is_row & (target >= 0) & (target < W)
    at_target = tl.load(logits + row * stride + target, is_target, float("nan")).to(tl.float32)
    at_target += tl.load(bias + target, is_target, 0.0)
    weight = tl.full([ROWS], 1.0, tl.float32)
    if weights is not None:
        weight = tl.load(weights + row, is_row, 0.0).to(tl.float32)

    # Maximum and sum of exponents of every COLUMNS-th word, so that threads wait for one another only at the end. One
    # of the two exponents that a running sum needs is always exp(0). The maximum starts at a finite number, since
    # -inf - -inf is NaN; a NaN among the logits is never a maximum, but stays in the sum.
    best = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    best_start = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, W, COLUMNS):
        column = start + offset
        value = _with_bias(logits, bias, start_of_row + column[None, :], is_row, column, W)
        exponent = tl.exp(-tl.abs(value - best))
        is_higher = value > best
        sums = tl.where(is_higher, sums * exponent + 1.0, sums + exponent)
        best_start = tl.where(is_higher, start, best_start)
        best = tl.where(is_higher, value, best)
    top = tl.max(best, 1)
    total = tl.sum(sums * tl.exp(best - top[:, None]), 1)
    tl.store(losses + row, (tl.log(total) - (at_target - top)) * weight, is_row)
    if picked is not None:
        choice = tl.min(tl.where(best == top[:, None], best_start + offset[None, :], W - 1), 1)

    if GRADIENTS or uniform is not None:
        # What another thread has yet to read above must not be written below.
        tl.debug_barrier()
        scale = weight / total
        if uniform is not None:
            place = tl.load(uniform + row, is_row, 0.0).to(tl.float32) * total
            drawn = tl.full([ROWS], W, tl.int32)
            before = tl.zeros([ROWS], tl.float32)
        for start in range(0, W, COLUMNS):
            column = start + offset
            at = start_of_row + column[None, :]
            exponent = tl.exp(_with_bias(logits, bias, at, is_row, column, W) - top[:, None])
            if uniform is not None:
                distribution = before[:, None] + tl.cumsum(exponent, 1)
                # Where rounding or a place of 0 would let it be drawn, a word without probability is not.
                is_reached = (distribution >= place[:, None]) & (exponent > 0)
                drawn = tl.minimum(drawn, tl.min(tl.where(is_reached, column[None, :], W), 1))
                before = tl.max(distribution, 1)
            if GRADIENTS:
                one_hot = tl.where(column[None, :] == target[:, None], weight[:, None], 0.0)
                gradient = (exponent * scale[:, None] - one_hot).to(logits.dtype.element_ty)
                tl.store(logits + at, gradient, is_row[:, None] & (column < W)[None, :])
        if uniform is not None:
            # The sums above and here are rounded in different orders: a place next to the end may not be reached.
            choice = tl.where(drawn < W, drawn, choice)
    if picked is not None:
        tl.store(picked + row, choice.to(tl.int64), is_row)

"""Cross-entropy over the vocabulary, and decoded tokens, holding the logits of some of the tokens at a time.

The vocabulary head with its cross-entropy is 40 to 45% of a step on a CPU, and with 30,522 words the logits of a batch
are its largest tensor. Not torch's F.linear_cross_entropy: it would need the logits a second time for the tokens, and
its chunks cost a CPU four times as much.

On a GPU what lies between the head's three products is a kernel that works in the logits' place: one by one,
PyTorch's operations pass over a chunk's logits a dozen times, and most of them in float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from job.model.products import add_product
from job.model.sublayer import ceil_div, kernels_serve

CHUNK_ELEMENTS = 1 << 25  # logits at a time, of which operations hold a copy in float32
# For the kernel, which holds none; of rows a multiple, since a GPU's products work on tiles of 128.
CHUNK_BYTES, CHUNK_ROWS = 1 << 28, 128
ROWS, COLUMNS, WARPS = 1, 2048, 8  # of the kernel's tile; of a dozen the fastest on an H200
CACHE_LINE = 64  # elements: rows of logits start at a multiple of it
# Words are padded to a multiple of this: products of another width, such as 30,522, take a GPU several times as long,
# since 16 bytes are what it reads at once. The weights themselves keep their shape, and checkpoints with them.
VOCABULARY_MULTIPLE = {"cpu": 1, "cuda": 64}
CPU_COLUMNS = 4096  # words at a time: with rows that start on cache lines, such a product is 1.3 times faster on a CPU


def linear_cross_entropy(
    hidden: Tensor,
    head: torch.nn.Linear,
    targets: Tensor,
    pick: bool = False,
    uniform: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum (scalar, float32) of the cross-entropy of head(hidden [N, H]) to targets [N] int64, times weights [N] if
    given.

    With `pick` also decoded tokens [N] (else [0]): the likeliest, or drawn at `uniform` [N] in [0, 1). Backward may run
    once.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    inputs = (hidden.to(dtype), head.weight, head.bias)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(*inputs, targets, pick, uniform, weights, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass makes the gradients too, while a chunk's logits are there; the backward pass only scales them.

    Kept for the backward pass, the logits would need the memory that chunks save; made anew, a third product.

    Weight and bias come in their own type and are cast here: autograd would round the gradient of a weight that was
    cast outside to the type that it was cast to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        pick: bool,
        uniform: Tensor | None,
        weights: Tensor | None,
        gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        n_words = len(weight)
        weight, bias = _padded(weight.to(hidden.dtype), bias.float())
        by_kernel = kernels_serve(hidden.device)
        cross_entropy = _by_kernel if by_kernel else _by_operations
        asked = _Asked(targets, pick, uniform if pick else None, weights, gradients)
        total = torch.zeros((), device=hidden.device)
        picked = targets.new_empty(len(targets) if pick else 0)
        # Of hidden, weight and bias; the last two are made by the first chunk.
        grads: list[Tensor] = [torch.empty_like(hidden)] if gradients else []
        size = _rows_at_once(len(weight), hidden.dtype, by_kernel)
        aligned = (len(weight) + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
        buffer = hidden.new_empty(min(size, len(targets)), aligned)[:, : len(weight)]
        for start in range(0, max(1, len(targets)), size):  # no tokens are an empty chunk
            part = slice(start, start + size)
            rows = hidden[part]
            logits = _product(rows, weight, buffer[: len(rows)])
            loss, chosen, to_logits = cross_entropy(logits, bias, asked.of(part))
            total += loss
            if chosen is not None:
                picked[part] = chosen
            if to_logits is not None:
                _add_gradients(grads, part, rows, weight, to_logits)
        if grads:
            ctx.save_for_backward(grads[0], *(gradient[:n_words] for gradient in grads[1:]))
        ctx.mark_non_differentiable(picked)
        return total, picked

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        return hidden * gradient.to(hidden.dtype), weight.mul_(gradient), bias * gradient, None, None, None, None, None


def _padded(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [V, H] and bias [V] with words that no token can be: their logits are -inf, their gradients 0."""
    missing = -len(weight) % VOCABULARY_MULTIPLE[weight.device.type]
    if not missing:
        return weight, bias
    return F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing), value=-math.inf)


def _product(rows: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """rows [N, H] @ weight [V, H].T in out [N, V]."""
    columns = CPU_COLUMNS if rows.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), columns):
        torch.mm(rows, weight[start : start + columns].T, out=out[:, start : start + columns])
    return out


def _rows_at_once(width: int, dtype: torch.dtype, by_kernel: bool) -> int:
    """Tokens whose logits [width] are held at a time."""
    if not by_kernel:
        return max(1, CHUNK_ELEMENTS // width)
    return max(CHUNK_ROWS, CHUNK_BYTES // (width * dtype.itemsize) // CHUNK_ROWS * CHUNK_ROWS)


class _Asked(NamedTuple):
    """What is asked of the logits of some tokens."""

    targets: Tensor  # [N] int64
    pick: bool
    uniform: Tensor | None  # [N] in [0, 1)
    weights: Tensor | None  # [N]
    gradients: bool

    def of(self, part: slice) -> _Asked:
        return self._replace(
            targets=self.targets[part],
            uniform=None if self.uniform is None else self.uniform[part],
            weights=None if self.weights is None else self.weights[part],
        )


# The loss's sum, decoded tokens [N] if asked for, and the gradient [N, V] of logits if asked for.
_Result = tuple[Tensor, Tensor | None, Tensor | None]


def _by_operations(logits: Tensor, bias: Tensor, asked: _Asked) -> _Result:
    """From a head's product [N, V] and its bias [V] float32; the gradient is float32."""
    target, picked = asked.targets[:, None], None
    logits = logits.float().add_(bias)
    if asked.pick and asked.uniform is None:
        picked = logits.argmax(-1)
    exponents = logits.sub_(logits.amax(-1, keepdim=True))
    at_target = exponents.gather(1, target)
    sums = exponents.exp_().sum(dim=-1, keepdim=True)
    weights = None if asked.weights is None else asked.weights[:, None]
    losses = sums.log() - at_target
    loss = (losses if weights is None else losses * weights).sum()
    if asked.uniform is not None:
        picked = _draw(exponents, asked.uniform[:, None])[:, 0]
    if not asked.gradients:
        return loss, picked, None
    to_logits = exponents.div_(sums).scatter_add_(1, target, -torch.ones_like(sums))
    return loss, picked, to_logits if weights is None else to_logits.mul_(weights)


def _by_kernel(logits: Tensor, bias: Tensor, asked: _Asked) -> _Result:
    """As `_by_operations`, in two passes over memory; the gradient takes the logits' place, in their type."""
    from job.model.cross_entropy_kernels import cross_entropy_rows

    n_rows, width = logits.shape
    losses = torch.empty(n_rows, device=logits.device)
    picked = torch.empty_like(asked.targets) if asked.pick else None
    if n_rows:
        given = (asked.targets, asked.uniform, asked.weights)
        cross_entropy_rows[(ceil_div(n_rows, ROWS),)](
            *(logits, logits.stride(0), bias),
            *(x if x is None else x.contiguous() for x in given),
            *(losses, picked, n_rows),
            W=width,
            COLUMNS=COLUMNS,
            ROWS=ROWS,
            GRADIENTS=asked.gradients,
            num_warps=WARPS,
        )
    return losses.sum(), picked, logits if asked.gradients else None


def _draw(exponents: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [N, 1] drawn from unnormalized probabilities [N, V] at uniform [N, 1].

    A draw inverts the distribution function.
    """
    distribution = exponents.cumsum(-1)
    return torch.searchsorted(distribution, uniform * distribution[:, -1:]).clamp(max=exponents.shape[1] - 1)


def _add_gradients(grads: list[Tensor], part: slice, rows: Tensor, weight: Tensor, to_logits: Tensor) -> None:
    """Gradients of hidden, weight and bias from those of a chunk's logits (softmax minus one-hot).

    A kernel gives them rounded to bf16, and the bias' gradient is a sum of rounded ones. So is the weight's: a bias is
    the weight of an input that is always 1, and as exact as the others. The sum is in float32, and rounding moves it by
    a thousandth of what it changes by from batch to batch: both go with the root of the sum of squares.
    """
    to_bias = to_logits.sum(0, dtype=torch.float32)
    to_logits = to_logits.to(rows.dtype)
    grads[0][part] = to_logits @ weight
    if len(grads) == 1:  # the first chunk: sums need no zeros to start from
        grads += [add_product(None, to_logits.T, rows), to_bias]
        return
    grads[2] += to_bias
    add_product(grads[1], to_logits.T, rows)

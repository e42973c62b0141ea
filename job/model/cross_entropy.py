"""Cross-entropy over the vocabulary, and decoded tokens, holding the logits of a few hundred tokens at a time.

The vocabulary head with its cross-entropy is 40 to 45% of a step on a CPU, and with 30,522 words the logits of a batch
are its largest tensor. Not torch's F.linear_cross_entropy: it would need the logits a second time for the tokens, and
its chunks cost a CPU four times as much.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25  # logits at a time
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
        total = torch.zeros((), device=hidden.device)
        picked = targets.new_empty(len(targets) if pick else 0)
        # Of hidden, weight and bias; the last two are made by the first chunk.
        grads: list[Tensor] = [torch.empty_like(hidden)] if gradients else []
        size = max(1, CHUNK_ELEMENTS // len(weight))
        aligned = (len(weight) + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
        buffer = hidden.new_empty(min(size, len(targets)), aligned)[:, : len(weight)]
        for start in range(0, max(1, len(targets)), size):  # no tokens are an empty chunk
            part = slice(start, start + size)
            rows, target = hidden[part], targets[part, None]
            logits = _product(rows, weight, buffer[: len(rows)]).float().add_(bias)
            best = logits.argmax(-1, keepdim=True) if pick and uniform is None else None
            exponents = logits.sub_(logits.amax(-1, keepdim=True))
            at_target = exponents.gather(1, target)
            sums = exponents.exp_().sum(dim=-1, keepdim=True)
            row_weights = None if weights is None else weights[part, None]
            losses = sums.log() - at_target
            total += (losses if row_weights is None else losses * row_weights).sum()
            if best is not None:
                picked[part] = best[:, 0]
            elif pick:
                assert uniform is not None
                picked[part] = _draw(exponents, uniform[part, None])[:, 0]
            if gradients:
                to_logits = exponents.div_(sums).scatter_add_(1, target, -torch.ones_like(sums))
                if row_weights is not None:
                    to_logits.mul_(row_weights)
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


def _draw(exponents: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [N, 1] drawn from unnormalized probabilities [N, V] at uniform [N, 1].

    A draw inverts the distribution function.
    """
    distribution = exponents.cumsum(-1)
    return torch.searchsorted(distribution, uniform * distribution[:, -1:]).clamp(max=exponents.shape[1] - 1)


def _add_gradients(grads: list[Tensor], part: slice, rows: Tensor, weight: Tensor, to_logits: Tensor) -> None:
    """Gradients of hidden, weight and bias from those of a chunk's logits (softmax minus one-hot)."""
    to_bias = to_logits.sum(0)
    to_logits = to_logits.to(rows.dtype)
    grads[0][part] = to_logits @ weight
    if len(grads) == 1:  # the first chunk: sums need no zeros to start from
        grads += [(to_logits.T @ rows).float(), to_bias]
        return
    grads[2] += to_bias
    if rows.dtype == torch.float32:
        grads[1].addmm_(to_logits.T, rows)
    else:
        grads[1] += to_logits.T @ rows

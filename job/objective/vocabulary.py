"""Cross-entropy over the vocabulary, and pseudo-tokens, without ever holding the logits of more than a few hundred tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25  # logits at a time
ALIGNMENT = 64  # elements: the matrix product is up to 1.7 times slower where rows of logits start off a cache line


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made while a chunk's logits are there, so that backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, pick: bool, uniform: Tensor | None,
                gradients: bool) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=hidden.device)
        picked = targets.new_empty(len(targets) if pick else 0)
        grads = (torch.empty_like(hidden), *(torch.zeros_like(x, dtype=torch.float32) for x in (weight, bias))) if gradients else ()
        parts = _chunks(len(targets), len(weight))
        width = -(-len(weight) // ALIGNMENT) * ALIGNMENT
        buffer = hidden.new_empty(max(part.stop - part.start for part in parts), width)[:, : len(weight)] if parts else hidden
        for part in parts:
            rows, target = hidden[part], targets[part, None]
            logits = torch.mm(rows, weight.T, out=buffer[: len(rows)]).float().add_(bias)
            best = logits.argmax(-1, keepdim=True) if pick and uniform is None else None
            exponents = logits.sub_(logits.amax(-1, keepdim=True))
            at_target = exponents.gather(1, target)
            sums = exponents.exp_().sum(dim=-1, keepdim=True)
            total += (sums.log() - at_target).sum()
            if pick:
                picked[part] = (best if best is not None else _draw(exponents, uniform[part, None]))[:, 0]  # type: ignore[index]
            if gradients:
                _add_gradients(grads, part, rows, weight, target, exponents, sums)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(picked)
        return total, picked

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        return hidden * gradient.to(hidden.dtype), weight.mul_(gradient), bias * gradient, None, None, None, None


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _draw(exponents: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [N, 1] drawn from unnormalized probabilities [N, V] by inverting the distribution function at uniform [N, 1]."""
    distribution = exponents.cumsum(-1)
    return torch.searchsorted(distribution, uniform * distribution[:, -1:]).clamp(max=exponents.shape[1] - 1)


def _add_gradients(grads: tuple[Tensor, ...], part: slice, rows: Tensor, weight: Tensor, target: Tensor, exponents: Tensor, sums: Tensor) -> None:
    """Gradients of the sum of the losses: softmax minus one-hot, times the other factor."""
    to_hidden, to_weight, to_bias = grads
    exponents = exponents.div_(sums).scatter_add_(1, target, -torch.ones_like(sums))
    to_bias += exponents.sum(0)
    exponents = exponents.to(rows.dtype)
    to_hidden[part] = exponents @ weight
    if rows.dtype == to_weight.dtype:
        to_weight.addmm_(exponents.T, rows)
    else:
        to_weight += exponents.T @ rows


def linear_cross_entropy(hidden: Tensor, head: torch.nn.Linear, targets: Tensor, pick: bool = False,
                         uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum (scalar, float32) of the cross-entropy of head(hidden [N, H]) to targets [N], and with `pick` the most likely tokens [N],
    or tokens drawn at `uniform` [N] in [0, 1). Backward may run once."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    inputs = [x.to(dtype) for x in (hidden, head.weight, head.bias)]
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(*inputs, targets, pick, uniform, torch.is_grad_enabled())

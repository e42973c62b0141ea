"""Linear layers whose backward pass adds their weights' gradients to float32 sums, by the product itself.

Autograd rounds each gradient to the weight's type, bf16, and leaves the adding to another kernel: one rounding and two
passes over memory more.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total [M, N] + a [M, K] @ b [K, N] in float32, in place; a @ b without a total."""
    if a.dtype == torch.float32:
        return a @ b if total is None else total.addmm_(a, b)
    if _multiplies_into_float32(a.device, a.dtype):
        # Without rounding the product to bf16, and without a pass over memory that only adds.
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    product = a @ b
    return product.float() if total is None else total.add_(product)


@cache
def _multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch can add a product of this type to a float32 matrix: on CUDA, of bf16 and fp16."""
    if device.type != "cuda":
        return False
    a, total = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # another build, such as for ROCm, or another type
        return False
    return True


class Accumulation(TorchFunctionMode):
    """Within it, F.linear with one of `weights` adds the gradients of weight and bias to their sums itself.

    Autograd gets none. Weights are told by their id(). `sum_of` gives a tensor's float32 sum, in the forward pass.
    """

    def __init__(self, weights: Container[int], sum_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weights, self.sum_of = weights, sum_of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and id(args[1]) in self.weights:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sums = (self.sum_of(weight), None if bias is None else self.sum_of(bias))
        with torch.autocast(x.device.type, enabled=False):
            return _Linear.apply(x.to(weight.dtype), weight, bias, *sums)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_sum: Tensor,
        bias_sum: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sums = (weight_sum, bias_sum)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_sum, bias_sum = ctx.sums
        of_rows = gradient.flatten(0, -2)
        # Before the products: cuBLAS warns of a missing context where it is the first that a thread calls.
        if bias_sum is not None:
            bias_sum += of_rows.sum(0, dtype=bias_sum.dtype)
        add_product(weight_sum, of_rows.T, x.flatten(0, -2))
        to_x = gradient @ weight if ctx.needs_input_grad[0] else None
        return to_x, None, None, None, None

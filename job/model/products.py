"""Products of linear layers in other ways than PyTorch's: in 8-bit floats, and with gradients added to float32 sums.

Autograd rounds each weight's gradient to the weight's type, bf16, and leaves the adding to another kernel: one rounding
and two passes over memory more.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from job.model.float8 import Weight


def add_product(total: Tensor | None, a: Tensor, b: Tensor, begins: bool = False) -> Tensor:
    """total [M, N] + a [M, K] @ b [K, N] in float32, in place; a @ b without a total, or into it where it `begins`."""
    of_float32 = a.dtype == torch.float32
    if of_float32 or _multiplies_into_float32(a.device, a.dtype):
        # Without rounding the product to bf16, and without a pass over memory that only adds.
        wide: dict[str, Any] = {} if of_float32 else {"out_dtype": torch.float32}
        if total is None:
            return torch.mm(a, b, **wide)
        return torch.mm(a, b, **wide, out=total) if begins else torch.addmm(total, a, b, **wide, out=total)
    product = a @ b
    if total is None:
        return product.float()
    return total.copy_(product) if begins else total.add_(product)


@cache
def _multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch can add a product of this type to a float32 matrix: on CUDA, of bf16 and fp16."""
    if device.type != "cuda":
        return False
    a = torch.ones(16, 16, device=device, dtype=dtype)
    total = torch.ones(16, 16, device=device, dtype=torch.float32)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # another build, such as for ROCm, or another type
        return False
    return True


class Products(TorchFunctionMode):
    """Within it, F.linear with certain weights is computed and differentiated otherwise. They are told by their id().

    Gradients of weights in `summed`, and of their biases, are added to float32 sums by the product that computes them,
    and autograd gets none. `sum_of` gives a tensor's sum, in the forward pass; `begins` tells, in the backward pass,
    whether a sum is to be written, not added to. Products with weights in `in_float8`, and the gradients of their
    inputs, are computed in 8-bit floats.
    """

    def __init__(
        self,
        summed: Container[int] = (),
        sum_of: Callable[[Tensor], Tensor] | None = None,
        in_float8: Mapping[int, Weight | None] | None = None,
        begins: Callable[[Tensor], bool] = lambda _: False,
    ) -> None:
        super().__init__()
        self.summed, self.sum_of, self.in_float8, self.begins = summed, sum_of, in_float8 or {}, begins

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and (id(args[1]) in self.summed or id(args[1]) in self.in_float8):
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sums: list[Tensor | None] = [None, None]
        dtype = torch.get_autocast_dtype(x.device.type)
        if self.sum_of and id(weight) in self.summed:
            sums = [self.sum_of(weight), None if bias is None else self.sum_of(bias)]
            dtype = weight.dtype  # cast beforehand, or not at all
        with torch.autocast(x.device.type, enabled=False):
            cast = weight.to(dtype)
            in_float8 = None
            if id(weight) in self.in_float8:
                in_float8 = self.in_float8[id(weight)] or Weight(cast)
            return _Linear.apply(
                x.to(dtype), cast, bias if bias is None else bias.to(dtype), *sums, in_float8, self.begins
            )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_sum: Tensor | None,
        bias_sum: Tensor | None,
        in_float8: Weight | None,
        begins: Callable[[Tensor], bool],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sums, ctx.in_float8, ctx.begins = (weight_sum, bias_sum), in_float8, begins
        if in_float8 is None:
            return F.linear(x, weight, bias)
        out = in_float8.product(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_sum, bias_sum = ctx.sums
        to_weight, to_bias = None, None
        of_rows = gradient.flatten(0, -2)
        # Before the products: cuBLAS warns of a missing context where it is the first that a thread calls.
        if bias_sum is not None:
            part = of_rows.sum(0, dtype=bias_sum.dtype)
            bias_sum.copy_(part) if ctx.begins(bias_sum) else bias_sum.add_(part)
        elif ctx.needs_input_grad[2]:
            to_bias = of_rows.sum(0)
        if weight_sum is not None:
            add_product(weight_sum, of_rows.T, x.flatten(0, -2), ctx.begins(weight_sum))
        elif ctx.needs_input_grad[1]:
            to_weight = of_rows.T @ x.flatten(0, -2)
        to_x = None
        if ctx.needs_input_grad[0]:
            of_float8 = ctx.in_float8
            to_x = of_float8.product_with_gradient(of_rows).view_as(x) if of_float8 else gradient @ weight
        return to_x, to_weight, to_bias, None, None, None, None

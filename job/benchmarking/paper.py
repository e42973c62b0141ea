"""A step on paper: what it asks of a device, for devices and sizes that are not at hand.

The step runs on PyTorch's fake tensors, which have shapes and types but no contents, while every operation is counted.
"""

from __future__ import annotations

import weakref
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from job.benchmarking.measure import Case, Shape
from job.runtime.precision import autocast

# Operations of aten that start no kernel: they make another view of a tensor, or memory without contents. Whole names,
# because parts of names match too much: "slice" is in slice_backward, which fills and copies.
SHAPES = {"view", "view_as", "reshape", "unflatten", "expand", "expand_as", "_reshape_alias", "_unsafe_view"}
DIMENSIONS = {"t", "transpose", "permute", "squeeze", "unsqueeze"}
PIECES = {"slice", "select", "split", "split_with_sizes", "chunk", "unbind", "as_strided"}
NAMES_ONLY = {"alias", "detach", "lift_fresh"}
WITHOUT_CONTENTS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE = SHAPES | DIMENSIONS | PIECES | NAMES_ONLY | WITHOUT_CONTENTS

# torch's counter of operations knows the attention kernels of GPUs only.
ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def starts_kernel(operation: Any) -> bool:
    """Whether an operation makes the device work. Those outside aten (prim, profiler) only ask or note something."""
    return operation.namespace == "aten" and operation.overloadpacket.__name__ not in FREE


class _Counter(TorchDispatchMode):
    """Kernels, the bytes they read and write, and the bytes that are alive at most."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.moved = self.alive = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if starts_kernel(func):
            self.kernels += 1
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in inputs + results)
        for x in results:
            self.hold(x)
        return out

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.alive -= size


def count(values: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Kernels, floating-point operations, bytes moved, and the most memory alive in an eager step.

    Weights, gradients and Adam's moments count as memory too. It is not to be trusted with
    training.activation_checkpointing: what is computed anew is freed late in this way of counting.
    """
    # A module of fake tensors cannot be moved to a device, and need not be.
    with FakeTensorMode(), patch.object(nn.Module, "to", lambda module, _: module):
        case = Case(values, shape, torch.device("cpu"))
        counter, flops = _Counter(), FlopCounterMode(display=False, custom_mapping=ATTENTION)
        for tensor in tree_leaves([case.objective.state_dict(), case.optimizer.tensors()]):
            if isinstance(tensor, Tensor):
                counter.hold(tensor)
        with flops, counter:
            step(case)
    return {
        "kernels": counter.kernels,
        "flops": flops.get_total_flops(),
        "bytes_moved": counter.moved,
        "peak_gib": counter.peak / 2**30,
    }


def step(case: Case) -> None:
    """One training step that reads no number back."""
    case.objective.zero_grad()
    base = None
    for stage in case.objective.stages(0):
        with autocast(case.config.training.dtype, case.device):
            loss, _, base = case.objective(case.batch, 0, stage, base)
        loss.backward()
    case.optimizer.step(0)

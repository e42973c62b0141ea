"""Weights, gradients and moments in shards, one a rank (FSDP2, Zhao et al. 2023, torch's fully_shard), for models that DDP cannot hold.

A part is gathered when its turn comes, forward and backward, and let go of after it. Gathering and reduction are in float32, so the
numbers are DDP's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

M = TypeVar("M", bound=nn.Module)


def shard(module: M, parts: Iterable[nn.Module], method: str, device: torch.device) -> M:
    """Put a module's shards on `device`, in place; `parts` of it are gathered one at a time, in their forward and in `method`."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    scalars = {p for p in module.parameters() if p.dim() == 0}  # fully_shard takes none; every rank keeps them
    for p in scalars:
        p.data = p.data.to(device)
    for part in parts:
        fully_shard(part, mesh=mesh, ignored_params=scalars)
        if hasattr(part, method):
            register_fsdp_forward_method(part, method)
    # The root too is let go of after a forward: what stays gathered does not see its next weights without a backward.
    fully_shard(module, mesh=mesh, ignored_params=scalars, reshard_after_forward=True)
    return module


def like(local: Tensor, parameter: Tensor) -> Tensor:
    """A local tensor as what it is a part of: sharded like a parameter."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class Shards:
    """A module's parameters as an optimizer takes them: `local`, this rank's shards, in the memory that the module uses. Whole ones are themselves."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        with torch.no_grad():
            self.local = tuple(p.to_local() if isinstance(p, DTensor) else p for p in parameters)
        self._on_all_ranks = [not isinstance(p, DTensor) for p in parameters]
        self._sharded = not all(self._on_all_ranks)

    def take_gradients(self) -> tuple[list[int], list[Tensor]]:
        """Give `local` the gradients of their module's parameters; returns those that there are, with the indices of their parameters."""
        for local, p in zip(self.local, self.parameters, strict=True):
            if local is not p:
                local.grad = p.grad.to_local() if isinstance(p.grad, DTensor) else None
        found = [(i, local.grad) for i, local in enumerate(self.local) if local.grad is not None]
        kept = [gradient for i, gradient in found if self._on_all_ranks[i]]
        if self._sharded and kept:  # FSDP reduces its own
            mean = torch.stack(kept)
            dist.all_reduce(mean)
            torch._foreach_copy_(kept, list(mean.div_(dist.get_world_size()).unbind()))
        return [i for i, _ in found], [gradient for _, gradient in found]

    def norms(self, indices: list[int], gradients: list[Tensor]) -> Tensor:
        """Norms [G] of gradients as a whole, whose shards these are."""
        norms = torch._foreach_norm(gradients)
        if not self._sharded:
            return torch.stack(norms)
        torch._foreach_mul_(norms, [dist.get_world_size() ** -0.5 if self._on_all_ranks[i] else 1.0 for i in indices])
        squares = torch.stack(norms).square_()
        dist.all_reduce(squares)
        return squares.sqrt_()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in (*self.local, *self.parameters):
            p.grad = None


@torch.no_grad()
def whole(module: M, new: Callable[[], M]) -> M:
    """A module without shards: itself, or a `new` one with its weights, which every rank then holds whole."""
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module
    copy = new()
    for target, parameter in zip(copy.parameters(), module.parameters(), strict=True):
        target.copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
    return copy

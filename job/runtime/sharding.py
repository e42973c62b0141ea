"""Weights, gradients and moments in shards, one a rank, for models that DDP cannot hold.

This is torch's fully_shard (FSDP2; Zhao et al. 2023, "PyTorch FSDP"). The weights of a part of the model are gathered
when its turn comes, forward and backward, and freed after it. Gathering and reduction are in float32, so the numbers
are those of DDP.
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
    """Put a module's shards on `device`, in place.

    `parts` of it are gathered one at a time, in their forward and in the method of theirs named `method`.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # fully_shard refuses parameters without a dimension to cut. Every rank keeps those whole, and since FSDP then knows
    # nothing of them, their gradients are averaged over ranks in Shards.take_gradients.
    scalars = {p for p in module.parameters() if p.dim() == 0}
    for p in scalars:
        p.data = p.data.to(device)
    for part in parts:
        fully_shard(part, mesh=mesh, ignored_params=scalars)
        if hasattr(part, method):
            register_fsdp_forward_method(part, method)
    # By default FSDP keeps the root's weights gathered after a forward, for the backward that follows. An evaluation
    # has none, and the next forward would use the gathered weights from before the optimizer's step.
    fully_shard(module, mesh=mesh, ignored_params=scalars, reshard_after_forward=True)
    return module


def like(local: Tensor, parameter: Tensor) -> Tensor:
    """The DTensor whose shard here is `local`, sharded like `parameter`; `local` itself when the parameter is not."""
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
    """A module's parameters as an optimizer takes them, and their gradients.

    `local` holds this rank's shard of each parameter, in the memory that the module uses; a parameter that is not
    sharded stands for itself. The optimizer works on these plain tensors: its foreach and fused kernels then run
    without DTensor's dispatch, and its code is the same with and without shards.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        with torch.no_grad():
            self.local = tuple(p.to_local() if isinstance(p, DTensor) else p for p in parameters)
        self._on_all_ranks = [not isinstance(p, DTensor) for p in parameters]
        self._sharded = not all(self._on_all_ranks)

    def take_gradients(self) -> tuple[list[int], list[Tensor]]:
        """Give `local` the gradients of the module's parameters.

        Returns the indices of the parameters that have a gradient, and these gradients.
        """
        for local, p in zip(self.local, self.parameters, strict=True):
            if local is not p:
                local.grad = p.grad.to_local() if isinstance(p.grad, DTensor) else None
        found = [(i, local.grad) for i, local in enumerate(self.local) if local.grad is not None]
        kept = [gradient for i, gradient in found if self._on_all_ranks[i]]
        if self._sharded and kept:  # the scalars of `shard`, which FSDP does not reduce; all of them at once
            mean = torch.stack(kept)
            dist.all_reduce(mean)
            torch._foreach_copy_(kept, list(mean.div_(dist.get_world_size()).unbind()))
        return [i for i, _ in found], [gradient for _, gradient in found]

    def norms(self, indices: list[int], gradients: list[Tensor]) -> Tensor:
        """Norms [G] of the whole gradients of which these are this rank's shards."""
        norms = torch._foreach_norm(gradients)
        if not self._sharded:
            return torch.stack(norms)
        # Squares of shards add up to the square of the whole. A gradient that every rank holds would be counted
        # world_size times, so each rank puts in its part of it.
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
    """A module without shards: itself, or a `new` one with its weights, which every rank then holds whole.

    All ranks call it together.
    """
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module
    copy = new()
    for target, parameter in zip(copy.parameters(), module.parameters(), strict=True):
        target.copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
    return copy

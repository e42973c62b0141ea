"""Weights, gradients and moments in shards, one a rank, for models that DDP cannot hold.

This is torch's fully_shard (FSDP2; Zhao et al. 2023, "PyTorch FSDP"). The weights of a part of the model are gathered
when its turn comes, forward and backward, and freed after it. Gradients are reduced in float32, and weights are
gathered in the type that autocast would round them to anyway, so the numbers are those of DDP.

Shards may lie within groups of neighbouring ranks, such as those of a node, while the groups hold copies of each other
(HSDP): weights are then gathered over the node's own links, and only gradients cross the network, once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from job.errors import UserError

M = TypeVar("M", bound=nn.Module)


def shard(
    module: M,
    parts: Iterable[nn.Module],
    method: str,
    device: torch.device,
    shard_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> M:
    """Put a module's shards on `device`, in place.

    `parts` of it are gathered one at a time, in their forward and in the method of theirs named `method`, in the
    `dtype` that their products are computed in. `shard_size` neighbouring ranks hold one copy between them (None: all
    ranks). Raises UserError when the ranks are no multiple of it.
    """
    mesh, parts = _mesh(device, shard_size), list(parts)
    whole_ones = _kept_whole(module, parts, dtype)
    for p in whole_ones:
        p.data = p.data.to(device)
    # Inputs stay as they are: residual streams are float32 also where products are not.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for part in parts:
        fully_shard(part, mesh=mesh, ignored_params=whole_ones, mp_policy=policy)
        if hasattr(part, method):
            register_fsdp_forward_method(part, method)
    # By default FSDP keeps the root's weights gathered after a forward, for the backward that follows. An evaluation
    # has none, and the next forward would use the gathered weights from before the optimizer's step.
    fully_shard(module, mesh=mesh, ignored_params=whole_ones, reshard_after_forward=True)
    return module


def _mesh(device: torch.device, shard_size: int | None) -> DeviceMesh:
    """The ranks in a line, or in rows of `shard_size` neighbours; the last dimension is the one that cuts."""
    ranks = dist.get_world_size()
    if shard_size is None or shard_size == ranks:
        return init_device_mesh(device.type, (ranks,))
    if ranks % shard_size != 0:
        raise UserError(
            f"training.shard_size={shard_size} does not divide the run's {ranks} processes; "
            "give the number of GPUs of a node; see docs: how-to/train-a-large-model"
        )
    return init_device_mesh(device.type, (ranks // shard_size, shard_size), mesh_dim_names=("copies", "shards"))


def _kept_whole(module: nn.Module, parts: Iterable[nn.Module], dtype: torch.dtype) -> set[nn.Parameter]:
    """Parameters that every rank holds whole. FSDP knows nothing of them: Shards.take_gradients averages their
    gradients.

    fully_shard refuses those without a dimension to cut. And what it gathers it gathers in one type: where that is not
    float32, what is no matrix product's (stream weights, gains of norms) would lose digits that autocast leaves it.
    """
    kept = {p for p in module.parameters() if p.dim() == 0}
    if dtype != torch.float32:
        for part in parts:
            rounded = {p for m in part.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
            kept |= {p for p in part.parameters() if p not in rounded}
    return kept


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
        meshes = [p.device_mesh for p in parameters if isinstance(p, DTensor)]
        self._sharded = bool(meshes)
        # The ranks that hold one copy of the model between them.
        self._shard_group = meshes[0].get_group(meshes[0].ndim - 1) if meshes else None

    def take_gradients(self) -> tuple[list[int], list[Tensor]]:
        """Give `local` the gradients of the module's parameters.

        Returns the indices of the parameters that have a gradient, and these gradients.
        """
        for local, p in zip(self.local, self.parameters, strict=True):
            if local is not p:
                local.grad = p.grad.to_local() if isinstance(p.grad, DTensor) else None
        found = [(i, local.grad) for i, local in enumerate(self.local) if local.grad is not None]
        kept = [gradient for i, gradient in found if self._on_all_ranks[i]]
        if self._sharded and kept:  # which FSDP does not reduce; all of them at once
            mean = torch.cat([gradient.flatten() for gradient in kept])
            dist.all_reduce(mean)
            parts = mean.div_(dist.get_world_size()).split([gradient.numel() for gradient in kept])
            torch._foreach_copy_(kept, [part.view_as(to) for part, to in zip(parts, kept, strict=True)])
        return [i for i, _ in found], [gradient for _, gradient in found]

    def norms(self, indices: list[int], gradients: list[Tensor]) -> Tensor:
        """Norms [G] of the whole gradients of which these are this rank's shards."""
        norms = torch._foreach_norm(gradients)
        if not self._sharded:
            return torch.stack(norms)
        # Squares of shards add up to the square of the whole. A gradient that every rank holds would be counted as
        # often as there are shards, so each rank puts in its part of it.
        part = dist.get_world_size(self._shard_group) ** -0.5
        torch._foreach_mul_(norms, [part if self._on_all_ranks[i] else 1.0 for i in indices])
        squares = torch.stack(norms).square_()
        dist.all_reduce(squares, group=self._shard_group)
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

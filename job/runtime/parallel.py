"""A module over the ranks of a run: whole on each (DDP), or in shards (FSDP); and what is reduced over them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from job.config import Config
from job.runtime.compiler import refuse_without_compiler
from job.runtime.distributed import Process
from job.runtime.precision import compute_dtype
from job.runtime.sharding import shard


def distribute(module: nn.Module, blocks: Iterable[nn.Module], config: Config, process: Process) -> nn.Module:
    """Put a module on the process's device; where there are other ranks, in shards or with DDP around it.

    `blocks` are its repeated parts, which FSDP gathers one at a time. Raises UserError where they cannot be compiled,
    and where training.shard_size does not divide the ranks.
    """
    if config.training.compile_model:
        refuse_without_compiler(process.device)
    if config.training.strategy == "fsdp" and process.world_size > 1:
        dtype = compute_dtype(config.training.dtype, process.device)
        return shard(module, blocks, "encode", process.device, config.training.shard_size, dtype)
    module.to(process.device)
    if process.world_size == 1:
        return module
    return DistributedDataParallel(
        module,
        device_ids=[process.device.index] if process.device.type == "cuda" else None,
        # A single direction gives one head, or the last block's other stream, no gradient. With all of cycle_vae's
        # terms every parameter has one, and the search for parameters without would cost time.
        find_unused_parameters=config.loss.loss_type != "cycle_vae",
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,  # buffers are constants
    )


def reduction_of_gradients(module: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Context of a forward and backward pass: gradients are reduced over ranks once a step, in the last one.

    Until then FSDP keeps whole gradients on every rank, 4 bytes a parameter: reducing them in every pass would cost as
    many reductions of the whole model as there are passes.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
    if isinstance(module, DistributedDataParallel) and not is_last:
        return module.no_sync()
    return nullcontext()


def reduction_seconds(module: nn.Module) -> dict[str, float]:
    """`communication_seconds` of a step, from the steps that DDP itself measures now and then; empty without DDP."""
    if not isinstance(module, DistributedDataParallel):
        return {}
    nanoseconds = module._get_ddp_logging_data().get("avg_backward_comm_time", 0)
    return {"communication_seconds": int(nanoseconds) / 1e9} if nanoseconds else {}


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """A tensor summed over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

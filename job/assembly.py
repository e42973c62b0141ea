"""The parts of a run: what the loop holds, and how it is put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from job.config import Config, to_dict
from job.data.loader import Loader
from job.data.shards import Dataset
from job.errors import UserError
from job.files import write_json, write_text
from job.model.multimodal import build_model, vocabulary
from job.model.weights import apply_weights
from job.monitoring.accumulator import Accumulator
from job.monitoring.environment import environment
from job.monitoring.flops import Work
from job.monitoring.phases import Parts, Phases
from job.monitoring.reporter import Reporter
from job.objective.fast import build_trainer
from job.objective.trainer import Trainer
from job.runtime.checkpoint import Checkpoint, open_checkpoint
from job.runtime.checkpointer import Checkpointer
from job.runtime.compiler import refuse_without_compiler
from job.runtime.distributed import Process
from job.runtime.optimizer import Optimizer
from job.runtime.precision import autocast
from job.runtime.sharding import shard, whole
from job.runtime.stop import StopSignals
from job.runtime.watchdog import Watchdog


@dataclass
class Job:
    """What the loop holds."""

    config: Config
    run_dir: Path
    process: Process
    train_data: Dataset
    validation_data: Dataset
    loader: Loader
    trainer: Trainer
    module: nn.Module  # the trainer, or DDP around it
    optimizer: Optimizer
    accumulator: Accumulator
    checkpointer: Checkpointer
    watchdog: Watchdog
    signals: StopSignals
    parts: Parts
    work: Work
    reporter: Reporter = field(init=False)  # while the loop runs
    phases: Phases = field(default_factory=Phases)
    evaluated: int = -1  # steps done at the last evaluation
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation


def batch_sizes(config: Config, world_size: int) -> tuple[int, int]:
    """Samples per optimizer step over all ranks, and forward passes per step. UserError when they do not divide."""
    training = config.training
    per_pass = training.train_batch_size * world_size
    if training.global_batch_size is None:
        return per_pass * training.gradient_accumulation_steps, training.gradient_accumulation_steps
    if training.global_batch_size % per_pass:
        raise UserError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of training.train_batch_size="
            f"{training.train_batch_size} x {world_size} processes; change one of them"
        )
    return training.global_batch_size, training.global_batch_size // per_pass


def find_checkpoint(config: Config, checkpointer: Checkpointer, say: Callable[[str], None]) -> Checkpoint | None:
    """Where to go on from: the run's own newest valid checkpoint, else the one that training.resume names, else nothing."""
    own = checkpointer.newest_valid()
    if config.training.resume == "never" and own is not None:
        raise UserError(
            f"{checkpointer.directory} holds checkpoints that training.resume=never would write over; give the run another "
            "logging.run_name, or move the directory away"
        )
    if own is None and config.training.resume not in ("auto", "never"):
        return open_checkpoint(Path(config.training.resume))
    return own


def new_trainer(config: Config, data: Dataset, starting: bool) -> Trainer:
    """The model, new or with the weights of training.init_from, inside the objective; on the CPU."""
    vocab_size, latent_dim = (
        vocabulary(config.model, data.info.vocab_size),
        config.model.latent_dim or data.info.latent_dim,
    )
    if latent_dim != data.info.latent_dim:
        raise UserError(
            f"model.latent_dim={latent_dim}, but the latents of the data have {data.info.latent_dim} dimensions; leave model.latent_dim out"
        )
    model = build_model(config.model, vocab_size, latent_dim, config.training.seed)
    if starting and config.training.init_from:
        apply_weights(model, Path(config.training.init_from))
    return build_trainer(model, config.model, config.loss, config.training, data.info.mask_token_id)


def distribute(trainer: Trainer, config: Config, process: Process) -> nn.Module:
    """Put the trainer on its device; where there are other ranks, in shards or with DDP around it. UserError where its blocks cannot be compiled."""
    if config.training.compile_model:
        refuse_without_compiler(process.device)
    if config.training.strategy == "fsdp" and process.world_size > 1:
        return shard(trainer, trainer.model.mmdit.blocks, "encode", process.device)  # type: ignore[union-attr,arg-type]
    trainer.to(process.device)
    if process.world_size == 1:
        return trainer
    one_direction = (
        config.loss.loss_type != "cycle_vae"
    )  # then a head, or the last block's other stream, gets no gradient
    return DistributedDataParallel(
        trainer,
        device_ids=[process.device.index] if process.device.type == "cuda" else None,
        find_unused_parameters=one_direction,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,
    )  # they are constants


@contextmanager
def for_evaluation(job: Job) -> Iterator[Trainer]:
    """The trainer as it is to be judged: whole, with the moving average of its weights where one is kept. All ranks enter together."""
    with job.optimizer.averaged(), autocast(job.config.training.dtype, job.process.device):
        yield whole(job.trainer, lambda: new_trainer(job.config, job.train_data, starting=False).to(job.process.device))


def tensors(job: Job) -> dict[str, Any]:
    """Everything of a checkpoint but its record."""
    return {
        "model": job.trainer.model.state_dict(),
        "optimizer": job.optimizer.tensors(),
        "metrics": job.accumulator.tensors(),
    }


def passes(trainer: Trainer, step: int) -> dict[str, int]:
    """Passes through the model of each kind (`job.monitoring.flops.pass_flops`) at 0-based step."""
    mode = trainer.mode(step)
    if mode != "cycle_vae":
        return {"joint" if mode == "unconditional" else mode: 1}
    cycle_text, cycle_latent = trainer.cycle_weights(step)
    return {"t2l": 1 + (cycle_latent > 0), "l2t": 1 + (cycle_text > 0)}


def reduction_seconds(module: nn.Module) -> dict[str, float]:
    """Time of the gradients' reduction in a step, from the steps that DDP itself measures now and then; empty without DDP."""
    if not isinstance(module, DistributedDataParallel):
        return {}
    nanoseconds = module._get_ddp_logging_data().get("avg_backward_comm_time", 0)
    return {"communication_seconds": int(nanoseconds) / 1e9} if nanoseconds else {}


def total_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def write_description(config: Config, run_dir: Path, process: Process) -> None:
    """config.yaml and environment.json of the run directory."""
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(to_dict(config)))
    write_json(run_dir / "environment.json", environment(process.device, process.world_size), indent=2)

"""The main job: `python -m job.train`, `torchrun -m job.train`, `cyclevae train`."""

from __future__ import annotations

from job.runtime.stop import StopSignals

signals = StopSignals()
if __name__ == "__main__":
    signals.install()  # before torch is imported: a signal in these seconds is not lost

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from job.command import guarded, unknown_key
from job.config import Config, config_dir, keys, to_dict, validate
from job.data.files import write_json, write_text
from job.data.loader import Loader, evaluation_batches, open_datasets
from job.data.sampler import Sampler
from job.data.shards import Dataset
from job.errors import ExitCode, UsageError, UserError
from job.model.multimodal import build_model, vocabulary
from job.model.weights import apply_weights
from job.monitoring.accumulator import Accumulator
from job.monitoring.curves import write_curves
from job.monitoring.environment import environment
from job.monitoring.phases import Phases
from job.monitoring.progress import Progress
from job.monitoring.training_log import JsonLines
from job.objective.evaluation import evaluate, table
from job.objective.noise import seed_for
from job.objective.trainer import Batch, Trainer
from job.runtime import distributed
from job.runtime.checkpoint import Checkpoint, Checkpointer, open_checkpoint
from job.runtime.delayed import DelayedRead
from job.runtime.distributed import Process
from job.runtime.optimizer import Optimizer, learning_rate
from job.runtime.precision import autocast
from job.runtime.resume import record, refuse_another_run
from job.runtime.watchdog import Watchdog
from job.sample import round_trips, write_samples


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
    module: nn.Module  # the trainer, wrapped by DDP when there are several ranks
    optimizer: Optimizer
    accumulator: Accumulator
    checkpointer: Checkpointer
    watchdog: Watchdog
    phases: Phases = field(default_factory=Phases)
    evaluated: int = -1  # steps done at the last evaluation
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation


def train(config: Config, run_dir: Path) -> ExitCode:
    """Train the run of a directory from where it stands to its end or to a stop. UserError and RetryError say why it failed."""
    warnings = validate(config)
    process = distributed.start(config.training.device, config.training.sick_rank_timeout_seconds)  # type: ignore[arg-type]
    say = print if process.is_main else lambda *_: None
    for warning in warnings:
        say(f"warning: {warning}")
    watchdog = Watchdog(config.training.sick_rank_timeout_seconds).start()
    train_data, validation_data = open_datasets(config)
    checkpointer = Checkpointer(run_dir / "checkpoints", process, keep_last=config.logging.keep_last, keep_every=config.logging.keep_every,
                                log=say, beat=watchdog.beat)
    checkpoint = find_checkpoint(config, checkpointer, say)
    global_batch_size, accumulation = batch_sizes(config, process.world_size)
    if checkpoint is not None:
        refuse_another_run(checkpoint.record, config, train_data.fingerprint, global_batch_size)
        if checkpoint.step >= config.training.num_train_steps and (run_dir / "result.json").exists():
            say(f"{run_dir} is finished: {checkpoint.step} steps; give the run another logging.run_name to train again")
            return ExitCode.FINISHED
    if process.is_main:
        write_description(config, run_dir, process)

    sampler = Sampler(train_data, len(train_data), global_batch_size, config.training.seed, config.data.length_bucketing)
    loader = Loader(train_data, sampler, rank=process.rank, world_size=process.world_size, batch_size=config.training.train_batch_size,
                    accumulation=accumulation, max_seq_len=config.model.max_seq_len, pad_to_max=config.data.pad_to_max,
                    standardize=config.data.standardize_latents, num_workers=config.data.num_workers, pin_memory=process.device.type == "cuda")
    trainer = build_trainer(config, train_data, process.device, starting=checkpoint is None)
    optimizer = Optimizer(trainer.model, config, process.device)
    job = Job(config, run_dir, process, train_data, validation_data, loader, trainer, wrap(trainer, config, process), optimizer,
              Accumulator(process.device), checkpointer, watchdog)
    start = 0
    if checkpoint is not None:
        saved = checkpointer.load(checkpoint, tensors(job))
        start, job.evaluated = checkpoint.step, saved["evaluated"]
    checkpointer.prepare(tensors(job))
    say(f"{run_dir}: {sum(p.numel() for p in trainer.parameters()) / 1e6:.1f} M parameters, {len(train_data)} training samples, "
        f"global batch {global_batch_size}, {process.world_size} x {process.device.type}, from step {start} to {config.training.num_train_steps}")
    reason = loop(job, start)
    if reason is not None:
        say(f"stopped ({reason}): the same command goes on from here")
        return ExitCode.STOPPED
    finish(job)
    return ExitCode.FINISHED


def loop(job: Job, start: int) -> str | None:
    """Steps `start` to num_train_steps. Returns why it stopped before the end, or None."""
    c, main = job.config, job.process.is_main
    total = c.training.num_train_steps
    log, evaluations = JsonLines(job.run_dir / "training_log.jsonl"), JsonLines(job.run_dir / "evaluation.jsonl")
    if main:
        log.continue_from(start)
        evaluations.continue_from(start if job.evaluated == start else start - 1)
    progress = Progress(total, start, show=main)
    batches = job.loader.steps(start, total)
    nonfinite_in_a_row, interval, tokens, last_save = DelayedRead(), start, 0, time.monotonic()
    job.module.train()
    stopping = evaluate_if_due(job, start, evaluations, progress) if start else None

    for step in range(start, total):
        if stopping:
            break
        job.watchdog.beat(step, "waiting for data")
        with job.phases("data_wait"):
            micro_batches = next(batches)
        job.watchdog.beat(step, "training")
        with job.phases("step"):
            tokens += int(micro_batches[0]["global_lengths"].sum())
            train_step(job, step, micro_batches)
            if nonfinite_in_a_row(job.optimizer.nonfinite_in_a_row) >= c.training.max_nonfinite_steps:
                raise UserError(describe_nonfinite(job))
        done = step + 1
        progress.update(done)
        if done % c.logging.log_freq == 0 or done == total:
            values = interval_values(job, done, done - interval, tokens)
            interval, tokens = done, 0
            progress.log(done, values)
            if main:
                log.write(values)
        stopping = signals.agreed(distributed.agree_max, c.training.max_minutes)
        stopping = stopping or evaluate_if_due(job, done, evaluations, progress)
        save_due = c.logging.save_minutes is not None and distributed.agree_max(int(time.monotonic() - last_save > 60 * c.logging.save_minutes))
        if stopping or done == total or save_due or (c.logging.save_freq and done % c.logging.save_freq == 0):
            last_save = time.monotonic()
            save(job, done, blocking=bool(stopping) or done == total)
    progress.close()
    if stopping and not job.checkpointer.wait():
        raise UserError(f"{job.run_dir}/checkpoints: stopped ({stopping}), but the checkpoint could not be written; earlier ones are kept")
    return stopping


def train_step(job: Job, step: int, micro_batches: list[Batch]) -> None:
    """One optimizer step: forward and backward of every micro-batch, one reduction over ranks, one update."""
    config, last = job.config, len(micro_batches) - 1
    for number, batch in enumerate(micro_batches):
        on_device = {name: tensor.to(job.process.device, non_blocking=True) for name, tensor in batch.items()}
        if config.model.dropout:
            torch.manual_seed(seed_for("dropout", config.training.seed, step, number, job.process.rank))
        synchronized = nullcontext() if number == last or not isinstance(job.module, DistributedDataParallel) else job.module.no_sync()
        with synchronized:
            with autocast(config.training.dtype, job.process.device):
                loss, metrics = job.module(on_device, step)
            (loss / len(micro_batches)).backward()
        job.accumulator.add(metrics)
    job.accumulator.end_step(step, job.optimizer.step(step))


def batch_sizes(config: Config, world_size: int) -> tuple[int, int]:
    """Samples per optimizer step over all ranks, and forward passes per step. UserError when they do not divide."""
    training = config.training
    per_pass = training.train_batch_size * world_size
    if training.global_batch_size is None:
        return per_pass * training.gradient_accumulation_steps, training.gradient_accumulation_steps
    if training.global_batch_size % per_pass:
        raise UserError(f"training.global_batch_size={training.global_batch_size} is not a multiple of training.train_batch_size="
                        f"{training.train_batch_size} x {world_size} processes; change one of them")
    return training.global_batch_size, training.global_batch_size // per_pass


def find_checkpoint(config: Config, checkpointer: Checkpointer, say: Any) -> Checkpoint | None:
    """Where to go on from: the run's own newest valid checkpoint, else the one that training.resume names, else nothing."""
    own = checkpointer.newest_valid()
    if config.training.resume == "never" and own is not None:
        raise UserError(f"{checkpointer.directory} holds checkpoints that training.resume=never would write over; give the run another "
                        "logging.run_name, or move the directory away")
    if own is None and config.training.resume not in ("auto", "never"):
        return open_checkpoint(Path(config.training.resume))
    return own


def build_trainer(config: Config, data: Dataset, device: torch.device, starting: bool) -> Trainer:
    """The model, new or with the weights of training.init_from, inside the objective."""
    vocab_size, latent_dim = vocabulary(config.model, data.info.vocab_size), config.model.latent_dim or data.info.latent_dim
    if latent_dim != data.info.latent_dim:
        raise UserError(f"model.latent_dim={latent_dim}, but the latents of the data have {data.info.latent_dim} dimensions; leave model.latent_dim out")
    model = build_model(config.model, vocab_size, latent_dim, config.training.seed)
    if starting and config.training.init_from:
        apply_weights(model, Path(config.training.init_from))
    return Trainer(model, config.model, config.loss, config.training, data.info.mask_token_id).to(device)


def wrap(trainer: Trainer, config: Config, process: Process) -> nn.Module:
    """DDP around the trainer where there are other ranks."""
    if process.world_size == 1:
        return trainer
    one_direction = config.loss.loss_type != "cycle_vae"  # then a head, or the last block's other stream, gets no gradient
    return DistributedDataParallel(trainer, device_ids=[process.device.index] if process.device.type == "cuda" else None,
                                   find_unused_parameters=one_direction, gradient_as_bucket_view=True)


def tensors(job: Job) -> dict[str, Any]:
    """Everything of a checkpoint but its record."""
    return {"model": job.trainer.model.state_dict(), "optimizer": job.optimizer.tensors(), "metrics": job.accumulator.tensors()}


def save(job: Job, done: int, blocking: bool) -> None:
    job.watchdog.beat(done, "saving")
    kept = record(done, job.config, job.train_data.fingerprint, job.loader.sampler.global_batch_size) | {"evaluated": job.evaluated}
    with job.phases("checkpoint"):
        job.checkpointer.save(done, tensors(job), kept, blocking=blocking)


def total_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def interval_values(job: Job, done: int, steps: int, tokens: int) -> dict[str, float]:
    """A line of the training log: means over the interval's steps. The only transfer from the device between evaluations."""
    with job.phases("step"):
        means = job.accumulator.read(total_over_ranks)
        nonfinite = job.optimizer.nonfinite_steps.item()
    seconds = job.phases.read()
    busy = seconds["step"] + seconds["data_wait"]
    return {
        "step": done, "epoch": job.loader.sampler.epoch(done), "lr": learning_rate(done - 1, job.config.optimizer, job.config.training), **means,
        "tokens_per_second": tokens / busy, "step_seconds": busy / steps, "data_wait_seconds": seconds["data_wait"] / steps, "nonfinite_steps": int(nonfinite),
    }


def refuse_unknown(values: DictConfig) -> None:
    """Refuse keys that were appended to the configuration (`+key=value`), which Hydra lets pass."""
    plain: dict[str, Any] = OmegaConf.to_container(values)  # type: ignore[assignment]
    for section, content in plain.items():
        for name in content if isinstance(content, dict) else [""]:
            if f"{section}.{name}" not in keys():
                raise UsageError(unknown_key(f"{section}.{name}".rstrip(".")))


class Stopped(Exception):
    """A stop was agreed in the middle of an evaluation."""


def evaluate_if_due(job: Job, done: int, log: JsonLines, progress: Progress) -> str | None:
    """Evaluate after `done` steps when it is time and not done yet. Returns why to stop, when a stop came in between."""
    c = job.config
    if job.evaluated == done or not (done == c.training.num_train_steps or (c.logging.eval_freq and done % c.logging.eval_freq == 0)):
        return None
    try:
        with job.phases("evaluate"), job.optimizer.averaged(), autocast(c.training.dtype, job.process.device):
            job.metrics = evaluate(job.trainer, validation_batches(job, done), c.training.seed, distributed.gather)
    except Stopped as stop:
        return str(stop)
    job.evaluated = done
    if job.process.is_main:
        log.write({"step": done, **job.metrics})
    short = ("l2t/ce", "l2t/latent_gain", "t2l/x0_cos", "t2l/text_gain", "t2l2t/token_acc", "l2t2l/cos")
    progress.say(f"evaluation at step {done}  " + "  ".join(f"{name} {job.metrics[name]:.3f}" for name in short))
    return None


def validation_batches(job: Job, done: int) -> Iterator[Batch]:
    """This rank's evaluation batches on the device; every rank asks for a stop equally often, whatever its share."""
    c, world_size = job.config, job.process.world_size
    count = min(c.logging.num_eval_batches * c.training.eval_batch_size, len(job.validation_data))
    rounds = -(-count // (c.training.eval_batch_size * world_size))
    batches = evaluation_batches(job.validation_data, num_samples=count, batch_size=c.training.eval_batch_size, rank=job.process.rank, world_size=world_size,
                                 max_seq_len=c.model.max_seq_len, pad_to_max=c.data.pad_to_max, standardize=c.data.standardize_latents)
    for _ in range(rounds):
        job.watchdog.beat(done, "evaluating")
        reason = signals.agreed(distributed.agree_max, c.training.max_minutes)
        if reason:
            raise Stopped(reason)
        batch = next(batches, None)
        if batch is not None:
            yield {name: tensor.to(job.process.device) for name, tensor in batch.items()}


def describe_nonfinite(job: Job) -> str:
    """Step, terms, parameter and samples of the last update that was skipped."""
    step = int(job.accumulator.bad_step)
    terms = ", ".join(job.accumulator.bad_terms(total_over_ranks)) or "no term"
    parameter = job.optimizer.names[int(job.optimizer.bad_parameter)]
    samples = job.loader.sampler.batch(step).tolist()
    listed = ", ".join(map(str, samples[:16])) + (f" and {len(samples) - 16} more" if len(samples) > 16 else "")
    return (f"loss or gradient not finite in {job.config.training.max_nonfinite_steps} steps in a row (training.max_nonfinite_steps), last in step {step}: "
            f"not finite: {terms}; first bad gradient: {parameter}; training samples {listed}; the last checkpoint is from before")


def write_description(config: Config, run_dir: Path, process: Process) -> None:
    """config.yaml and environment.json of the run directory."""
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(to_dict(config)))
    write_json(run_dir / "environment.json", environment(process.device, process.world_size), indent=2)


def finish(job: Job) -> None:
    """The files and the table that show what the run came to. result.json, written last, marks it finished."""
    c = job.config
    if not job.checkpointer.wait():
        raise UserError(f"{job.run_dir}/checkpoints: the last checkpoint could not be written; free space there and run the same command again")
    if not job.metrics:  # the run had ended before and only lacked its result
        job.evaluated = -1
        evaluate_if_due(job, c.training.num_train_steps, JsonLines(job.run_dir / "evaluation.jsonl"), Progress(0, 0, show=False))
    if not job.process.is_main:
        return
    with job.optimizer.averaged(), autocast(c.training.dtype, job.process.device):
        trips = round_trips(job.trainer, job.validation_data, c, c.logging.num_samples)
    write_samples(job.run_dir / "samples.txt", trips)
    write_curves(job.run_dir)
    write_json(job.run_dir / "result.json", {"step": c.training.num_train_steps, **job.metrics}, indent=2)
    print(f"\n{table(job.metrics)}\n\n{(job.run_dir / 'samples.txt').read_text()}\nfinished: {job.run_dir}")


outcomes: list[ExitCode | UserError] = []  # of this process's runs: several in a sweep without a cluster


@hydra.main(config_path=str(config_dir()), config_name="mmdit_cycle_vae", version_base="1.3")
def run(values: DictConfig) -> None:
    """One run (of a sweep): configuration and run directory from Hydra."""
    try:
        refuse_unknown(values)
        outcomes.append(train(OmegaConf.to_object(values), Path(HydraConfig.get().runtime.output_dir)))  # type: ignore[arg-type]
        distributed.shutdown()
    except UserError as error:  # kept until the sweep is over, and from Hydra, which would print the command line first
        outcomes.append(error)


def main() -> None:
    """Run what the command line says and exit with the worst outcome."""
    run()
    failures = [outcome for outcome in outcomes if isinstance(outcome, UserError)]
    for failure in failures[:-1]:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        raise failures[-1]
    sys.exit(max(outcomes, default=ExitCode.FINISHED))


if __name__ == "__main__":
    guarded(main)

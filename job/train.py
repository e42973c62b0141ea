"""The main job: `python -m job.train`, `torchrun -m job.train`, `cyclevae train`."""

from __future__ import annotations

from job.runtime.launcher_variables import use_huge_pages
from job.runtime.stop import StopSignals, ignore_in_worker

signals = StopSignals()
if __name__ == "__main__":
    signals.install()  # before torch is imported: a signal in these seconds is not lost
    use_huge_pages()  # before torch is imported: it reads the variable once

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.nn.parallel import DistributedDataParallel

from job.assembly import (
    Job,
    batch_sizes,
    distribute,
    find_checkpoint,
    new_trainer,
    passes,
    reduction_seconds,
    tensors,
    total_over_ranks,
    write_description,
)
from job.command import guarded, unknown_key
from job.config import Config, config_dir, keys, validate
from job.data.loader import Batch, Loader, dead_worker, open_datasets
from job.data.sampler import Sampler
from job.errors import ExitCode, JobError, UsageError, UserError
from job.monitoring.accumulator import Accumulator
from job.monitoring.flops import Work
from job.monitoring.phases import Parts, process_start
from job.monitoring.progress import Progress
from job.monitoring.reporter import Reporter
from job.objective.noise import seed_for
from job.runtime import distributed
from job.runtime.checkpointer import Checkpointer
from job.runtime.delayed import DelayedRead
from job.runtime.optimizer import Optimizer, learning_rate
from job.runtime.precision import autocast, compute_dtype
from job.runtime.resume import record, refuse_another_run
from job.runtime.watchdog import Watchdog
from job.validation import evaluate_if_due, finish, last_evaluation


def train(config: Config, run_dir: Path) -> ExitCode:
    """Train the run of a directory from where it stands to its end or to a stop. UserError and RetryError say why it failed."""
    started = time.time() if codes else process_start()
    warnings = validate(config)
    process = distributed.start(config.training.device, config.training.sick_rank_timeout_seconds)  # type: ignore[arg-type]
    say: Callable[[str], None] = print if process.is_main else lambda _: None
    for warning in warnings:
        say(f"warning: {warning}")
    with Watchdog(config.training.sick_rank_timeout_seconds) as watchdog:
        return train_watched(config, run_dir, process, watchdog, say, started)


def train_watched(
    config: Config,
    run_dir: Path,
    process: distributed.Process,
    watchdog: Watchdog,
    say: Callable[[str], None],
    started: float,
) -> ExitCode:
    """`train`, while a watchdog looks on."""
    train_data, validation_data = open_datasets(config)
    checkpointer = Checkpointer(
        run_dir / "checkpoints",
        process,
        keep_last=config.logging.keep_last,
        keep_every=config.logging.keep_every,
        log=say,
        beat=watchdog.beat,
    )
    checkpoint = find_checkpoint(config, checkpointer, say)
    global_batch_size, accumulation = batch_sizes(config, process.world_size)
    if checkpoint is not None:
        refuse_another_run(checkpoint.record, config, train_data.fingerprint, global_batch_size)
        if checkpoint.step >= config.training.num_train_steps and (run_dir / "result.json").exists():
            say(f"{run_dir} is finished: {checkpoint.step} steps; give the run another logging.run_name to train again")
            return ExitCode.FINISHED
    if process.is_main:
        write_description(config, run_dir, process)

    sampler = Sampler(
        train_data, len(train_data), global_batch_size, config.training.seed, config.data.length_bucketing
    )
    loader = Loader(
        train_data,
        sampler,
        rank=process.rank,
        world_size=process.world_size,
        batch_size=config.training.train_batch_size,
        accumulation=accumulation,
        max_seq_len=config.model.max_seq_len,
        pad_to_max=config.data.pad_to_max,
        standardize=config.data.standardize_latents,
        num_workers=config.data.num_workers,
        pin_memory=process.device.type == "cuda",
        worker_init=ignore_in_worker,
    )
    trainer = new_trainer(config, train_data, starting=checkpoint is None)
    module = distribute(trainer, config, process)
    optimizer = Optimizer(trainer.model, config, process.device)
    job = Job(
        config,
        run_dir,
        process,
        train_data,
        validation_data,
        loader,
        trainer,
        module,
        optimizer,
        Accumulator(process.device),
        checkpointer,
        watchdog,
        signals,
        Parts(process.device),
        Work(config.model, trainer.model.vocab_size, trainer.model.latent_dim),
    )  # type: ignore[arg-type]
    start = 0
    if checkpoint is not None:
        saved = checkpointer.load(checkpoint, tensors(job))
        start, job.metrics = checkpoint.step, last_evaluation(job, checkpoint.step) if process.is_main else {}
        lost = distributed.agree_max(int(process.is_main and not job.metrics))
        job.evaluated = -1 if lost else saved["evaluated"]
    checkpointer.prepare(tensors(job))
    say(
        f"{run_dir}: {sum(p.numel() for p in trainer.parameters()) / 1e6:.1f} M parameters, {len(train_data)} training samples, "
        f"global batch {global_batch_size}, {process.world_size} x {process.device.type}, from step {start} to {config.training.num_train_steps}"
    )
    with Reporter(
        config,
        run_dir,
        process,
        job.phases,
        job.work,
        dtype=compute_dtype(config.training.dtype, process.device),
        saves=checkpointer.stats,
        silence=lambda: watchdog.seconds_since_beat,
        gather=distributed.gather,
        started=started,
    ) as job.reporter:
        reason = loop(job, start)
        if reason is not None:
            signals.ignore_further()
            say(f"stopped ({reason}): the same command goes on from here")
            return ExitCode.STOPPED
        finish(job)
        distributed.barrier()  # or the endpoints of ranks that have nothing to finish would seem to be lost
    return ExitCode.FINISHED


def loop(job: Job, start: int) -> str | None:
    """Steps `start` to num_train_steps. Returns why it stopped before the end, or None."""
    c = job.config
    total = c.training.num_train_steps
    job.reporter.begin(start, job.evaluated)
    progress = Progress(total, start, show=job.process.is_main)
    batches = job.loader.steps(start, total)
    nonfinite_in_a_row, interval, last_save = DelayedRead(), start, time.monotonic()
    job.module.train()
    stopping = evaluate_if_due(job, start, progress) if start else None

    for step in range(start, total):
        if stopping:
            break
        job.watchdog.beat(step, "waiting for data")
        with job.phases("data_wait"):
            micro_batches = next(batches)
        job.watchdog.beat(step, "training")
        with job.phases("step"):
            job.work.add(micro_batches[0]["global_lengths"].numpy(), passes(job.trainer, step))
            train_step(job, step, micro_batches)
            if nonfinite_in_a_row(job.optimizer.nonfinite_in_a_row) >= c.training.max_nonfinite_steps:
                raise UserError(describe_nonfinite(job))
        done = step + 1
        job.reporter.step_ended()
        progress.update(done)
        if done % c.logging.log_freq == 0 or done == total:
            progress.log(done, report_interval(job, done, done - interval))
            interval = done
        stopping = signals.agreed(distributed.agree_max, c.training.max_minutes)
        stopping = stopping or evaluate_if_due(job, done, progress)
        save_due = c.logging.save_minutes is not None and distributed.agree_max(
            int(time.monotonic() - last_save > 60 * c.logging.save_minutes)
        )
        if stopping or done == total or save_due or (c.logging.save_freq and done % c.logging.save_freq == 0):
            last_save = time.monotonic()
            save(job, done, blocking=bool(stopping) or done == total)
            if stopping:
                waited = (signals.requested_seconds_ago or 0.0) - job.checkpointer.stats.last_save_seconds
                progress.say(
                    f"stop: {max(0.0, waited):.1f} s to the step's end, {job.checkpointer.stats.last_save_seconds:.1f} s to save"
                )
    progress.close()
    if stopping and not job.checkpointer.wait():
        raise UserError(
            f"{job.run_dir}/checkpoints: stopped ({stopping}), but the checkpoint could not be written; earlier ones are kept"
        )
    return stopping


def train_step(job: Job, step: int, micro_batches: list[Batch]) -> None:
    """One optimizer step: forward and backward of every micro-batch, one reduction over ranks, one update."""
    config, stages = job.config, job.trainer.stages(step)
    for number, batch in enumerate(micro_batches):
        on_device: dict[str, Any] = {
            name: tensor.to(job.process.device, non_blocking=True) for name, tensor in batch.items()
        }
        on_device["row_lengths"] = batch["attention_mask"].sum(1).tolist()
        if config.model.dropout:
            torch.manual_seed(seed_for("dropout", config.training.seed, step, number, job.process.rank))
        for stage in range(stages):
            last = number == len(micro_batches) - 1 and stage == stages - 1
            reducing = (
                job.module.no_sync() if isinstance(job.module, DistributedDataParallel) and not last else nullcontext()
            )
            with reducing:
                with job.parts("forward"), autocast(config.training.dtype, job.process.device):
                    loss, metrics = job.module(on_device, step, stage=stage)
                with job.parts("backward"):
                    (loss / len(micro_batches)).backward()
        job.accumulator.add(metrics)
    with job.parts("optimizer"):
        grad_norm = job.optimizer.step(step)
    job.accumulator.end_step(step, grad_norm)
    job.parts.end_step()


def save(job: Job, done: int, blocking: bool) -> None:
    job.watchdog.beat(done, "saving")
    kept = record(done, job.config, job.train_data.fingerprint, job.loader.sampler.global_batch_size) | {
        "evaluated": job.evaluated
    }
    with job.phases("checkpoint"):
        job.checkpointer.save(done, tensors(job), kept, blocking=blocking)


def report_interval(job: Job, done: int, steps: int) -> dict[str, float]:
    """Give the means over the interval's steps to the logs and to Prometheus. The only transfer from the device between evaluations."""
    with job.phases("step"):
        means = job.accumulator.read(total_over_ranks)
        nonfinite = job.optimizer.nonfinite_steps.item()
    seconds, work = job.phases.read(), job.work.read()
    busy = seconds["step"] + seconds["data_wait"]
    values = {
        "step": done,
        "epoch": job.loader.sampler.epoch(done),
        "lr": learning_rate(done - 1, job.config.optimizer, job.config.training),
        **means,
        "tokens_per_second": work.tokens / busy,
        "step_seconds": busy / steps,
        "data_wait_seconds": seconds["data_wait"] / steps,
        **job.parts.read(),
        **reduction_seconds(job.module),
        "model_flops_utilization": work.flops / busy / job.reporter.all_flops,
        **job.reporter.device_values,
        "nonfinite_steps": int(nonfinite),
    }
    job.reporter.interval(values, seconds, work)
    return values


def refuse_unknown(values: DictConfig) -> None:
    """Refuse keys that were appended to the configuration (`+key=value`), which Hydra lets pass."""
    plain: dict[str, Any] = OmegaConf.to_container(values)  # type: ignore[assignment]
    for section, content in plain.items():
        for name in content if isinstance(content, dict) else [""]:
            if f"{section}.{name}" not in keys():
                raise UsageError(unknown_key(f"{section}.{name}".rstrip(".")))


def describe_nonfinite(job: Job) -> str:
    """Step, terms, parameter and samples of the last update that was skipped."""
    step = int(job.accumulator.bad_step)
    terms = ", ".join(job.accumulator.bad_terms(total_over_ranks)) or "no term"
    parameter = job.optimizer.names[int(job.optimizer.bad_parameter)]
    samples = job.loader.sampler.batch(step).tolist()
    listed = ", ".join(map(str, samples[:16])) + (f" and {len(samples) - 16} more" if len(samples) > 16 else "")
    return (
        f"loss or gradient not finite in {job.config.training.max_nonfinite_steps} steps in a row (training.max_nonfinite_steps), last in step {step}: "
        f"not finite: {terms}; first bad gradient: {parameter}; training samples {listed}; the last checkpoint is from before"
    )


def known_failure(error: RuntimeError | MemoryError) -> JobError:
    """One line for what the system took away: memory, or a loader process. Other errors are raised again."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return UserError(
            f"out of memory ({str(error).splitlines()[0][:120] if str(error) else 'on the host'}); lower training.train_batch_size and set "
            "training.global_batch_size to keep the batch, or set training.activation_checkpointing=true"
        )
    lost = dead_worker(error)
    if lost is None:
        raise error
    return lost


codes: list[ExitCode] = []  # of this process's runs: several in a sweep without a cluster
failures: list[JobError] = []


@hydra.main(config_path=str(config_dir()), config_name="mmdit_cycle_vae", version_base="1.3")
def run(values: DictConfig) -> None:
    """One run (of a sweep): configuration and run directory from Hydra."""
    try:
        refuse_unknown(values)
        with distributed.peers_needed():
            codes.append(train(OmegaConf.to_object(values), Path(HydraConfig.get().runtime.output_dir)))  # type: ignore[arg-type]
        distributed.shutdown()
    except JobError as error:  # kept until the sweep is over, and from Hydra, which would print the command line first
        failures.append(error)
    except (RuntimeError, MemoryError) as error:
        failures.append(known_failure(error))


def main() -> ExitCode:
    """Run what the command line says; returns the worst outcome."""
    run()
    for failure in failures[:-1]:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        raise failures[-1]
    return max(codes, default=ExitCode.FINISHED)


if __name__ == "__main__":
    sys.exit(guarded(main))

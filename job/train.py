"""The story of a run, top to bottom: opened in `train`, stepped in `loop`, ended in `finish`.

`python -m job.train`, `torchrun -m job.train` and `cyclevae train` all come to `main` at the end of this file.
"""

from __future__ import annotations

from job.command import gather_overrides
from job.key_help import answer_help
from job.launch.from_train import launch_if_asked
from job.output import open_standard_descriptors
from job.runtime.launcher_variables import (
    last_end,
    launch_time,
    placement,
    status_lines,
    trainer_server,
    tune_allocators,
)
from job.runtime.processors import share_machine, use_own_processors
from job.runtime.stop import StopSignals

signals = StopSignals()
if __name__ == "__main__":
    open_standard_descriptors()  # before anything opens a file or a socket
    answer_help()  # at once: torch takes seconds to load
    gather_overrides()  # before a launcher or Hydra reads them
    launch_if_asked()
    signals.install()  # before torch is imported, which takes seconds: a signal meanwhile would be lost
    tune_allocators()  # before torch is imported: it reads the variables once
    use_own_processors()

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from job import checkpoint_names
from job.batch_sizes import batch_sizes
from job.command import explain, guarded, refuse_unknown_keys
from job.comparison.sweep import show_sweep
from job.config import Config, config_dir
from job.config_checks import validate
from job.data.description import DIRECTORY, to_values, write_model_files
from job.data.loader import (
    Batch,
    dead_worker,
    evaluation_batches,
    open_datasets,
)
from job.data_copy import fetch_data
from job.errors import ExitCode, JobError, UsageError, UserError
from job.files import storage_problem, write_json
from job.monitoring.curves import write_curves
from job.monitoring.environment import write_description
from job.monitoring.evaluation_table import headline, table
from job.monitoring.flops import Work
from job.monitoring.goodput import Times
from job.monitoring.phases import Phases, process_start
from job.monitoring.progress import Progress
from job.monitoring.reporter import Reporter
from job.monitoring.trackers import refuse_missing_packages
from job.monitoring.trainer_status import TrainerServer
from job.objective.evaluation import evaluate
from job.objective.noise import seed_for
from job.origin import describe_run, load_initial, sources
from job.reporting.end_of_run import report_of
from job.round_trips import text_scoring, write_samples
from job.row_kinds import RowKinds
from job.run_samples import is_due, make_samples, sample_if_due
from job.runtime import distributed
from job.runtime.checkpoint import Checkpoint
from job.runtime.checkpointer import Checkpointer
from job.runtime.delayed import DelayedRead
from job.runtime.distributed import Process
from job.runtime.memory import keep_freed_memory
from job.runtime.optimizer import learning_rate
from job.runtime.parallel import reduction_of_gradients, reduction_seconds, sum_over_ranks
from job.runtime.precision import autocast, backward_pass, compute_dtype, set_up
from job.runtime.resume import find_checkpoint, record, refuse_another_run
from job.runtime.watchdog import Watchdog
from job.trained import RECORD_KEY, tokenizer_of
from job.training_run import (
    METRICS_KEY,
    OVER_RANKS,
    TrainingRun,
    describe_nonfinite,
    for_evaluation,
    new_learner,
    new_loader,
    restore,
)

# How long a step may take that runs the blocks compiled for the first time in this process. Compiling took 301 s for a
# small model on a busy machine, while the watchdog's default is 300 s: it ended a run that was well, and would have
# ended each further attempt. The price: a rank that hangs in such a step is found that much later.
COMPILE_SECONDS = 1800.0
RESULT = "result.json"  # of the run directory, written last: the run is finished


class Stopped(Exception):
    """All ranks agreed on a stop in the middle of an evaluation."""


# Opening.


def train(config: Config, run_dir: Path, started: float | None = None) -> ExitCode:
    """Train the run of a directory from where it stands to its end or to a stop. JobError says why it failed.

    `started` is when the process was, or in a sweep of one process the run, in seconds since 1970; None: now.
    """
    started = started or time.time()
    warnings = validate(config)
    timeout = config.training.sick_rank_timeout_seconds
    # Another rank may compile that much longer; in all other steps the watchdogs keep to their own timeout.
    patience = max(timeout, COMPILE_SECONDS) if config.training.compile_model else timeout
    process = distributed.start(config.training.device, patience)  # type: ignore[arg-type]
    share_machine(distributed.gather)
    set_up(config.training, process.device)
    if process.device.type == "cpu":
        keep_freed_memory()
    # Flushed: who waits for a run wants to know for what.
    say: Callable[[str], None] = partial(print, flush=True) if process.is_main else lambda _: None
    for warning in warnings:
        say(f"warning: {warning}")
    if process.is_main:
        refuse_missing_packages(config)
    with Watchdog(timeout) as watchdog:
        return train_watched(config, run_dir, process, watchdog, say, started)


def train_watched(
    config: Config,
    run_dir: Path,
    process: Process,
    watchdog: Watchdog,
    say: Callable[[str], None],
    started: float,
) -> ExitCode:
    """`train`, while a watchdog looks on: it ends the process when nothing moves any more."""
    total = config.training.num_train_steps
    fetch_data(config, partial(watchdog.beat, 0, "copying data"), lambda: bool(signals.requested))
    train_data, held_out = open_datasets(config)
    checkpointer = Checkpointer(
        run_dir / checkpoint_names.DIRECTORY,
        process,
        keep_last=config.logging.keep_last,
        keep_every=config.logging.keep_every,
        log=say,
        beat=watchdog.beat,
        stop=lambda: signals.requested,
    )
    checkpoint = find_checkpoint(config, checkpointer)
    global_batch_size, _ = batch_sizes(config.training, process.world_size)
    if checkpoint is not None:
        for note in refuse_another_run(checkpoint.record, config, train_data.fingerprint, global_batch_size):
            say(note)
        if checkpoint.step >= total and (run_dir / RESULT).exists():
            say(f"{run_dir} is finished: {checkpoint.step} steps; give the run another logging.run_name to train again")
            return ExitCode.FINISHED
    initial = load_initial(config) if checkpoint is None else None
    description = describe_run(config, train_data, checkpoint, initial, say)
    loader = new_loader(config, train_data, description, process)
    checkpointer.refuse_unwritable()
    if process.is_main:
        (run_dir / RESULT).unlink(missing_ok=True)  # of a finished run that is trained further
        write_description(config, run_dir, process.device, process.world_size)
        write_model_files(run_dir / DIRECTORY, description, sources(train_data, initial))

    learner = new_learner(config, train_data, process, initial)
    model = learner.objective.model
    with Reporter(
        config,
        run_dir,
        process,
        Phases(),
        Work(config.model, model.vocab_size, model.latent_dim),
        dtype=compute_dtype(config.training.dtype, process.device),
        saves=checkpointer.stats,
        silence=lambda: watchdog.seconds_since_beat,
        gather=distributed.gather,
        times=Times(started, launch_time(os.environ), last_end(os.environ)),
    ) as reporter:
        run = TrainingRun(
            config, run_dir, process, description, loader, held_out, learner, checkpointer, watchdog, reporter
        )
        return train_to_end(run, checkpoint, say)


def train_to_end(run: TrainingRun, checkpoint: Checkpoint | None, say: Callable[[str], None]) -> ExitCode:
    """From the checkpoint, or from the beginning, to the last step or a stop."""
    total = run.config.training.num_train_steps
    start = restore(run, checkpoint, say) if checkpoint is not None else 0
    run.checkpointer.prepare(run.learner.tensors())
    parameters = sum(p.numel() for p in run.learner.objective.parameters()) / 1e6
    say(
        f"{run.run_dir}: {parameters:.1f} M parameters, {len(run.loader.dataset)} training samples, global batch "
        f"{run.loader.sampler.global_batch_size}, {run.process.world_size} x {run.process.device.type}, "
        f"from step {start} to {total}"
    )
    reason = loop(run, start)
    if reason is not None:
        signals.ignore_further()
        say(f"stopped ({reason}): the same command goes on from here")
        return ExitCode.STOPPED
    finish(run)
    # Ranks that have nothing to write wait here: without it Prometheus would take their endpoints for lost.
    distributed.barrier()
    return ExitCode.FINISHED


# Training.


def loop(run: TrainingRun, start: int) -> str | None:
    """Steps `start` to num_train_steps. Returns why it stopped before the end, or None."""
    c = run.config
    total = c.training.num_train_steps
    learner, reporter = run.learner, run.reporter
    reporter.begin(start, run.evaluated, run.sampled)
    trainer = trainer_server(os.environ)
    progress = Progress(
        total,
        start,
        show=run.process.is_main,
        status_lines=status_lines(os.environ),
        trainer=TrainerServer(*trainer) if trainer else None,
    )
    batches = run.loader.steps(start, total)
    nonfinite_in_a_row = DelayedRead()
    logged, last_save = start, time.monotonic()
    learner.module.train()
    stopping = measure_if_due(run, start, progress) if start else None

    if c.training.compile_model and not stopping:
        progress.say("compiling: the first step takes a minute or more")
    for step in range(start, total):
        if stopping:
            break
        began = time.monotonic()
        run.watchdog.beat(step, "waiting for data")
        with reporter.phases("data_wait"):
            micro_batches = next(batches)
        agreement = distributed.agree_meanwhile(partial(wishes, run, last_save))
        run.watchdog.beat(step, "training", compile_patience(run, str(learner.objective.plan.passes(step))))
        with reporter.phases("step"):
            count_work(run, step, micro_batches[0])
            train_step(run, step, micro_batches)
            if nonfinite_in_a_row(learner.optimizer.nonfinite_in_a_row) >= c.training.max_nonfinite_steps:
                raise UserError(describe_nonfinite(run))
        done = step + 1
        reporter.step_ended()
        progress.update(done)
        if done % c.logging.log_freq == 0 or done == total:
            progress.log(done, report_interval(run, done, done - logged))
            logged = done
        elif step == start:
            progress.first_step(done, time.monotonic() - began)
        stop_wish, save_wish = agreement()
        stopping = signals.reason(stop_wish, c.training.max_minutes) or measure_if_due(run, done, progress)
        save_by_steps = bool(c.logging.save_freq and done % c.logging.save_freq == 0)
        if stopping or done == total or save_wish or save_by_steps:
            last_save = time.monotonic()
            save(run, done, blocking=bool(stopping) or done == total)
            if stopping:
                seconds = run.checkpointer.stats.last_save_seconds
                to_step_end = max(0.0, (signals.requested_seconds_ago or 0.0) - seconds)
                progress.say(f"stop: {to_step_end:.1f} s to the step's end, {seconds:.1f} s to save")
    progress.close()
    if stopping and not run.checkpointer.wait():
        raise UserError(
            f"{run.checkpointer.directory}: stopped ({stopping}), but the checkpoint could not be written; "
            "earlier ones are kept"
        )
    return stopping


def count_work(run: TrainingRun, step: int, batch: Batch) -> None:
    """Count what a step does with a global batch, of which `batch` is a part."""
    lengths = batch["global_lengths"].numpy()
    kinds = batch["global_kinds"].numpy() if "global_kinds" in batch else np.zeros_like(lengths)
    for kind in np.unique(kinds).tolist():
        run.reporter.work.add(lengths[kinds == kind], run.learner.objective.plan.passes(step, kind), kind)


def compile_patience(run: TrainingRun, kind: str) -> float:
    """Seconds that the watchdog allows a step of this kind; 0, its own timeout alone, unless it may be compiling.

    Steps with other passes are of another kind: cycle terms set in late, and the shapes that come with them are new.
    Evaluations do not run compiled.
    """
    if not run.config.training.compile_model or kind in run.compiled:
        return 0.0
    run.compiled.add(kind)
    return COMPILE_SECONDS


def train_step(run: TrainingRun, step: int, micro_batches: list[Batch]) -> None:
    """One optimizer step: forward and backward of every micro-batch, one reduction over ranks, one update."""
    config, learner, device = run.config, run.learner, run.process.device
    stages = learner.objective.stages(step)
    for number, batch in enumerate(micro_batches):
        on_device: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        on_device["row_lengths"] = batch["attention_mask"].sum(1).tolist()  # asked of the device it would wait for it
        if "global_kinds" in batch:
            on_device["row_kinds"] = RowKinds.of(batch["global_kinds"].numpy(), batch["position"].numpy())
        if config.model.dropout:
            # A function of the step, like all randomness: a resumed run draws the same.
            torch.manual_seed(seed_for("dropout", config.training.seed, step, number, run.process.rank))
        base = None
        for stage in stages:
            is_last = number == len(micro_batches) - 1 and stage == stages[-1]
            with reduction_of_gradients(learner.module, is_last):
                with learner.parts("forward"), autocast(config.training.dtype, device):
                    loss, metrics, base = learner.module(on_device, step, stage, base)
                with learner.parts("backward"), backward_pass():
                    (loss / len(micro_batches)).backward()
        learner.accumulator.add(metrics, len(on_device["row_lengths"]))
    with learner.parts("optimizer"):
        grad_norm = learner.optimizer.step(step)
    learner.accumulator.end_step(step, grad_norm)
    learner.parts.end_step()


def report_interval(run: TrainingRun, done: int, steps: int) -> dict[str, float]:
    """Give the means over the interval's steps to the logs and to Prometheus.

    The metrics come from the device here, all in one transfer, and nowhere else between two evaluations.
    """
    learner, reporter, sampler = run.learner, run.reporter, run.loader.sampler
    with reporter.phases("step"):
        means = learner.accumulator.read(sum_over_ranks)
        nonfinite = learner.optimizer.nonfinite_steps.item()
    seconds, work = reporter.phases.read(), reporter.work.read()
    busy = seconds["step"] + seconds["data_wait"]
    values = {
        "step": done,
        "epoch": sampler.epoch(done),
        "lr": learning_rate(done - 1, run.config.optimizer, run.config.training),
        **means,
        "tokens_per_second": work.tokens / busy,
        "step_seconds": busy / steps,
        "data_wait_seconds": seconds["data_wait"] / steps,
        **learner.parts.read(),
        **reduction_seconds(learner.module),
        "model_flops_utilization": work.flops / busy / reporter.all_flops,
        **reporter.device_values,
        "nonfinite_steps": int(nonfinite),
    }
    reporter.interval(values, seconds, work)
    return values


def wishes(run: TrainingRun, last_save: float) -> list[int]:
    """What this rank would have all ranks do at the end of the step: stop, for which reason, and save, by the clock.

    Clocks differ, but all ranks must stop and save together.
    """
    minutes = run.config.logging.save_minutes
    save_now = minutes is not None and time.monotonic() - last_save > 60 * minutes
    return [signals.wish(run.config.training.max_minutes), int(save_now)]


def save(run: TrainingRun, done: int, blocking: bool) -> None:
    """Save a checkpoint of `done` steps; unless `blocking` it is written while training goes on."""
    run.watchdog.beat(done, "saving")
    sampler = run.loader.sampler
    kept = record(done, run.config, run.loader.dataset.fingerprint, sampler.global_batch_size)
    kept |= {"evaluated": run.evaluated, "sampled": run.sampled}
    kept |= {RECORD_KEY: to_values(run.description), METRICS_KEY: OVER_RANKS}
    with run.reporter.phases("checkpoint"):
        run.checkpointer.save(done, run.learner.tensors_to_save(), kept, blocking=blocking)


# Evaluating.


def measure_if_due(run: TrainingRun, done: int, progress: Progress) -> str | None:
    """Evaluate after `done` steps, and write samples, when it is time for either and it is not done yet.

    Returns why to stop, when a stop came in between.
    """
    stopping = evaluate_if_due(run, done, progress)
    if not stopping:
        sample_if_due(run, done, progress)
    return stopping


def evaluate_if_due(run: TrainingRun, done: int, progress: Progress) -> str | None:
    """The evaluation's part of `measure_if_due`."""
    c = run.config
    if run.evaluated == done or not is_due(c.logging.eval_freq, done, c.training.num_train_steps):
        return None
    batches = evaluation_batches(
        run.held_out,
        run.loader.format,
        num_samples=c.logging.num_eval_batches * c.training.eval_batch_size,
        batch_size=c.training.eval_batch_size,
        rank=run.process.rank,
        world_size=run.process.world_size,
    )
    on_device = ({name: tensor.to(run.process.device) for name, tensor in batch.items()} for batch in batches)

    def between_batches() -> None:
        run.watchdog.beat(done, "evaluating")
        wish = distributed.agree_max(signals.wish(c.training.max_minutes))
        reason = signals.reason(wish, c.training.max_minutes)
        if reason:
            raise Stopped(reason)

    try:
        with run.reporter.phases("evaluate"), for_evaluation(run) as objective:
            run.metrics = evaluate(
                objective,
                on_device,
                c.training.seed,
                distributed.gather,
                between_batches,
                text_scoring(c, tokenizer_of(run.held_out)),
            )
    except Stopped as stop:
        return str(stop)
    run.evaluated = done
    run.reporter.evaluation(done, run.metrics)
    progress.say(f"evaluation at step {done}  {headline(run.metrics)}")
    return None


# Ending.


def finish(run: TrainingRun) -> None:
    """The files and the table that show what the run came to. result.json, written last, marks it finished."""
    c = run.config
    if not run.checkpointer.wait():
        raise UserError(
            f"{run.checkpointer.directory}: the last checkpoint could not be written; "
            "free space there and run the same command again"
        )
    run.watchdog.beat(c.training.num_train_steps, "finishing")
    # Those of the last line of samples.jsonl, unless another process wrote it or logging.sample_freq is 0.
    trips = make_samples(run) if run.trips is None else run.trips
    report = report_of(run)
    if not run.process.is_main:
        return
    samples = run.run_dir / "samples.txt"
    write_samples(samples, trips)
    write_curves(run.run_dir)
    write_json(run.run_dir / RESULT, {"step": c.training.num_train_steps, **run.metrics}, indent=2)
    print(f"\n{table(run.metrics)}\n\n{samples.read_text()}\nfinished: {run.run_dir}")
    if report:
        print(f"report: {report}")


# The command.

# Of this process's runs: a sweep without a cluster (`--multirun`) makes several, one after the other.
outcomes: list[ExitCode] = []
failures: list[JobError] = []
swept: list[Path] = []  # run directories of a sweep, as far as it came; noted on rank 0, which compares them


@hydra.main(config_path=str(config_dir()), config_name="mmdit_cycle_vae", version_base="1.3")
def run_from_hydra(values: DictConfig) -> None:
    """One run (of a sweep): configuration and run directory from Hydra."""
    if outcomes and signals.requested:  # a sweep that was told to stop: each further run would start, and save a step
        print(f"not started: {HydraConfig.get().runtime.output_dir}", flush=True)
        outcomes.append(ExitCode.STOPPED)
        return
    started = time.time() if outcomes or failures else process_start()
    if HydraConfig.get().mode is RunMode.MULTIRUN and placement(os.environ, alone=True).rank == 0:
        swept.append(Path(HydraConfig.get().runtime.output_dir))
    try:
        refuse_unknown_keys(values)
        config: Config = OmegaConf.to_object(values)  # type: ignore[assignment]
        with distributed.peers_needed():
            outcomes.append(train(config, Path(HydraConfig.get().runtime.output_dir), started))
        distributed.shutdown()
    except JobError as error:
        # Kept until the sweep is over: its other runs may do better. And Hydra would print its own words about it.
        failures.append(error)
    except OmegaConfBaseException as error:  # a value that is missing inside a list, which composing lets pass
        failures.append(UsageError(explain(error)))
    except (RuntimeError, MemoryError, OSError) as error:
        failures.append(known_failure(error))


def known_failure(error: RuntimeError | MemoryError | OSError) -> JobError:
    """One line for what the system took away: memory, room on a disk, or a loader process.

    Other errors are raised again.
    """
    if problem := storage_problem(error):
        return UserError(problem)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        detail = str(error).splitlines()[0][:120] if str(error) else "on the host"
        return UserError(
            f"out of memory ({detail}); lower training.train_batch_size and set training.global_batch_size to keep the "
            "batch, or set training.activation_checkpointing=true"
        )
    lost = dead_worker(error)
    if lost is None:
        raise error
    return lost


def main() -> ExitCode:
    """Run what the command line says; returns the worst outcome."""
    run_from_hydra()
    if not signals.requested:
        show_sweep(swept)
    for failure in failures[:-1]:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        raise failures[-1]
    return max(outcomes, default=ExitCode.FINISHED)


if __name__ == "__main__":
    exit_code = guarded(main, output_is_result=False)
    signals.ignore_to_the_end()  # a launcher repeats its notice until the ranks are gone
    sys.exit(exit_code)

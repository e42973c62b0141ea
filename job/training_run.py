"""A run in progress: what its loop holds, how that is put together, and how it is put back after a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from job import checkpoint_names
from job.batch_sizes import batch_sizes
from job.config import Config
from job.config_checks import refuse_idle_rows
from job.data.description import ModelDescription
from job.data.loader import BatchFormat, BatchSplit, Loader
from job.data.sampler import MixedSampler, Sampler
from job.data.shards import Dataset
from job.files import json_lines
from job.model.weights import apply_weights
from job.monitoring.accumulator import Accumulator
from job.monitoring.phases import Parts
from job.monitoring.reporter import SAMPLES, Reporter
from job.objective.build import build_objective
from job.objective.objective import Objective
from job.origin import InitialWeights
from job.round_trips import RoundTrip
from job.row_kinds import PAIRED, kinds_of_batch, refuse_missing_kinds
from job.runtime import distributed
from job.runtime.checkpoint import Checkpoint
from job.runtime.checkpointer import Checkpointer
from job.runtime.distributed import Process
from job.runtime.optimizer import Optimizer
from job.runtime.parallel import distribute, sum_over_ranks
from job.runtime.precision import autocast
from job.runtime.sharding import whole
from job.runtime.stop import ignore_in_worker
from job.runtime.watchdog import Watchdog

# In a checkpoint's record: of what its metrics are the sums. Versions without it saved those of a single rank.
METRICS_KEY, OVER_RANKS = "metrics", "over all ranks, weighted with samples"


@dataclass
class Learner:
    """What learns: its tensors are what a checkpoint holds."""

    objective: Objective
    module: nn.Module  # the objective, or what runs it on several ranks
    optimizer: Optimizer
    accumulator: Accumulator  # the metrics of the log interval so far
    parts: Parts  # where the time of a step goes

    def tensors(self) -> dict[str, Any]:
        """All state that training changes, but the step."""
        return {
            "model": self.objective.model.state_dict(),
            "optimizer": self.optimizer.tensors(),
            "metrics": self.accumulator.tensors(),
        }

    def tensors_to_save(self) -> dict[str, Any]:
        """The same, with the metrics of all ranks in place of this one's. All ranks call it together."""
        return self.tensors() | {"metrics": self.accumulator.over_ranks(sum_over_ranks)}


@dataclass
class TrainingRun:
    """A run in progress: what its loop holds."""

    config: Config
    run_dir: Path
    process: Process
    description: ModelDescription  # what the model takes along of its data
    loader: Loader  # of the training split
    held_out: Dataset
    learner: Learner
    checkpointer: Checkpointer
    watchdog: Watchdog
    reporter: Reporter
    compiled: set[str] = field(default_factory=set)  # kinds of steps that ran compiled in this process
    evaluated: int = -1  # steps done at the last evaluation
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation, on rank 0
    sampled: int = -1  # steps done at the last line of samples.jsonl
    trips: list[RoundTrip] | None = None  # of that line, where this process made it; empty on ranks other than 0


def new_loader(config: Config, data: Dataset, description: ModelDescription, process: Process) -> Loader:
    """This rank's batches of the training split."""
    training = config.training
    global_batch_size, accumulation = batch_sizes(training, process.world_size)
    rows = data.info.rows_of_kinds("train")
    refuse_idle_rows(config, rows)
    sampler: Sampler | MixedSampler
    if rows[PAIRED] == len(data):
        sampler = Sampler(data, len(data), global_batch_size, training.seed, config.data.length_bucketing)
    else:
        kinds = kinds_of_batch(rows, global_batch_size, config.data.unpaired_per_batch)
        refuse_missing_kinds(kinds, training.train_batch_size)
        sampler = MixedSampler(data, rows, kinds, training.seed, config.data.length_bucketing)
    return Loader(
        data,
        sampler,
        BatchFormat.of(config, description),
        BatchSplit(process.rank, process.world_size, training.train_batch_size, accumulation),
        num_workers=config.data.num_workers,
        pin_memory=process.device.type == "cuda",
        worker_init=ignore_in_worker,
    )


def new_learner(config: Config, data: Dataset, process: Process, initial: InitialWeights | None) -> Learner:
    """Objective, model and optimizer on their device, from the weights of training.init_from where there are any."""
    objective = build_objective(config, data.info)
    if initial is not None:
        apply_weights(objective.model, initial.weights, initial.path)
    blocks: Any = objective.model.mmdit.blocks
    module = distribute(objective, blocks, config, process)
    optimizer = Optimizer(objective.model, config, process.device)
    return Learner(objective, module, optimizer, Accumulator(process.device), Parts(process.device))


def restore(run: TrainingRun, checkpoint: Checkpoint, say: Callable[[str], None]) -> int:
    """Go on from a checkpoint; returns the steps it has done."""
    saved = run.checkpointer.load(checkpoint, run.learner.tensors())
    over_ranks = saved.get(METRICS_KEY) == OVER_RANKS
    if not over_ranks and bool(run.learner.accumulator.sums.any()):
        say(
            f"{checkpoint.path} is of an earlier version, which kept the metrics of one rank alone: the next line of "
            f"training_log.jsonl is a mean of the steps after step {checkpoint.step} only"
        )
    run.learner.accumulator.loaded(run.process.is_main, over_ranks)
    if run.process.is_main:
        # The checkpoint only says that the evaluation was made; its figures stand in the log.
        evaluations = json_lines(run.run_dir / "evaluation.jsonl")
        run.metrics = next((line for line in evaluations if line["step"] == checkpoint.step), {})
    # Without them (the run directory was copied, or training.resume names another run) every rank evaluates again.
    figures_lost = distributed.agree_max(int(run.process.is_main and not run.metrics))
    run.evaluated = -1 if figures_lost else saved["evaluated"]
    samples_lost = run.process.is_main and not has_line(run.run_dir / SAMPLES, checkpoint.step)
    run.sampled = -1 if distributed.agree_max(int(samples_lost)) else saved.get("sampled", -1)
    return checkpoint.step


def has_line(log: Path, step: int) -> bool:
    """Whether a log holds a line of a step."""
    return any(line["step"] == step for line in json_lines(log))


@contextmanager
def for_evaluation(run: TrainingRun) -> Iterator[Objective]:
    """The objective as it is judged: whole, with the moving average of its weights where one is kept.

    All ranks enter together, since shards are gathered here.
    """

    def new_copy() -> Objective:
        return build_objective(run.config, run.loader.dataset.info).to(run.process.device)

    with run.learner.optimizer.averaged(), autocast(run.config.training.dtype, run.process.device):
        yield whole(run.learner.objective, new_copy)


def describe_nonfinite(run: TrainingRun) -> str:
    """Step, terms, parameter and samples of the last update that was skipped."""
    accumulator, optimizer, limit = run.learner.accumulator, run.learner.optimizer, 16
    step = int(accumulator.bad_step)
    terms = ", ".join(accumulator.bad_terms(sum_over_ranks)) or "no term"
    parameter = optimizer.names[int(optimizer.bad_parameter)]
    samples = run.loader.sampler.batch(step).tolist()
    listed = ", ".join(map(str, samples[:limit]))
    if len(samples) > limit:
        listed += f" and {len(samples) - limit} more"
    in_a_row = run.config.training.max_nonfinite_steps
    saved = max(checkpoint_names.steps(run.checkpointer.directory), default=None)
    if saved is None:
        kept = "there is no checkpoint"
    elif saved <= step + 1 - in_a_row:
        kept = f"the last checkpoint, of step {saved}, is from before"
    else:
        kept = f"the last checkpoint, of step {saved}, is not from before; save less often (logging.save_freq)"
    return (
        f"loss or gradient not finite in {in_a_row} steps in a row (training.max_nonfinite_steps), "
        f"last in step {step}: not finite: {terms}; first bad gradient: {parameter}; training samples {listed}; "
        f"{kept}"
    )

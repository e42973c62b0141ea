"""The plan of a run: everything that is counted, in one object, and the lines that tell it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from job.batch_sizes import batch_sizes
from job.config import Config
from job.planning.batches import LARGEST
from job.planning.counts import Sizes, StepWork, peak_on_paper, sizes, step_work
from job.planning.data import PlannedData

GIB, MB = 2**30, 10**6


@dataclass(frozen=True)
class Speed:
    """How fast a run is assumed to be."""

    tokens_per_second: float  # of all ranks together
    because: str  # where that comes from


@dataclass(frozen=True)
class Plan:
    """What a run needs. Bytes and seconds."""

    ranks: int
    data: PlannedData
    sizes: Sizes
    rows: int  # of a forward pass of a rank
    shards: int  # ranks that hold one copy of the state between them
    peak: int  # bytes of a rank's tensors in a step, counted on paper
    step: StepWork
    steps: int
    keep_last: int
    keep_every_kept: int  # checkpoints that logging.keep_every adds
    speed: Speed | None = None
    largest: dict[str, Any] | None = None  # rows that fit, in what, and how that is known
    measured: dict[int, float | None] | None = None  # peak bytes by rows, of --try

    @property
    def tokens(self) -> float:
        """Text tokens of the whole run."""
        return self.steps * self.step.tokens

    @property
    def seconds(self) -> float | None:
        """Time of the steps; None where no speed is given."""
        return self.tokens / self.speed.tokens_per_second if self.speed else None

    @property
    def elsewhere(self) -> int:
        """Bytes of the state and of the gradients that other ranks hold: sharded ranks have a part of them each."""
        return (self.sizes.state + self.sizes.gradients) * (self.shards - 1) // self.shards

    @property
    def checkpoint_room(self) -> int:
        """Bytes that checkpoints take at most: those that are kept, and the one that is being written."""
        return (self.keep_last + 1 + self.keep_every_kept) * self.sizes.checkpoint

    def to_values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        sized = asdict(self.sizes)
        return {
            "parameters": self.sizes.total_parameters,
            "parameters_by_part": dict(self.sizes.parameters),
            "bytes": {name: sized[name] for name in ("weights", "gradients", "moments", "average")},
            "peak_bytes": self.peak,
            "ranks": self.ranks,
            "rows": self.rows,
            "samples_per_step": self.step.samples,
            "tokens_per_step": self.step.tokens,
            "flops_per_step": self.step.flops,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_second": self.speed.tokens_per_second if self.speed else None,
            "seconds": self.seconds,
            "checkpoint_bytes": self.sizes.checkpoint,
            "checkpoint_room_bytes": self.checkpoint_room,
            "largest_batch": self.largest,
            "measured_peak_bytes": self.measured,
        }


def plan_of(config: Config, data: PlannedData, ranks: int) -> Plan:
    """The plan of a configuration on so many ranks. UserError where its batch does not divide among them."""
    samples, _ = batch_sizes(config.training, ranks)
    counted = sizes(config, data, ranks)
    shards = (config.training.shard_size or ranks) if config.training.strategy == "fsdp" else 1
    rows = config.training.train_batch_size
    steps, every = config.training.num_train_steps, config.logging.keep_every
    plan = Plan(
        ranks=ranks,
        data=data,
        sizes=counted,
        rows=rows,
        shards=shards,
        peak=peak_on_paper(config, data, rows),  # activations are every rank's own
        step=step_work(config, data, samples),
        steps=steps,
        keep_last=config.logging.keep_last,
        keep_every_kept=steps // every if every else 0,
    )
    return replace(plan, peak=plan.peak - plan.elsewhere)


def as_text(plan: Plan) -> str:
    """The plan in lines, a subject each."""
    lines = [model_line(plan), data_line(plan), step_line(plan), run_line(plan)]
    lines += memory_lines(plan)
    if plan.largest:
        more = " or more" if plan.largest["rows"] == LARGEST else ""
        lines.append(("largest batch", f"{plan.largest['rows']} rows a pass{more} in {plan.largest['where']}"))
    if plan.measured:
        found = [f"{rows} rows: {measured_peak(peak)}" for rows, peak in sorted(plan.measured.items())]
        lines.append(("", f"measured: {', '.join(found)}"))
    lines += checkpoint_lines(plan)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def model_line(plan: Plan) -> tuple[str, str]:
    """Parameters by part, the largest first."""
    parts = sorted(plan.sizes.parameters.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {millions(count)}" for name, count in parts)
    return "model", f"{millions(plan.sizes.total_parameters)} parameters ({plan.sizes.total_parameters}): {shown}"


def data_line(plan: Plan) -> tuple[str, str]:
    """Samples and their lengths."""
    data = plan.data
    if not data.prepared:
        return "data", f"not here: texts of {data.lengths.mean():.0f} tokens are assumed (--mean-tokens)"
    return (
        "data",
        f"{data.samples} texts of {data.lengths.mean():.1f} tokens on average, the longest {data.lengths.max()}",
    )


def step_line(plan: Plan) -> tuple[str, str]:
    """What a step does."""
    step = plan.step
    passes = step.samples // (plan.rows * plan.ranks)
    split = f"{plan.ranks} x {plan.rows} rows" + (f" x {passes} passes" if passes > 1 else "")
    return "step", f"{step.samples} texts ({split}), {step.tokens:.0f} tokens, {flop(step.flops)}"


def run_line(plan: Plan) -> tuple[str, str]:
    """What all steps come to, and how long they take."""
    text = f"{plan.steps} steps: {plan.tokens / 1e6:.3g} M tokens, {flop(plan.steps * plan.step.flops)}"
    if plan.data.samples:
        text += f", {plan.steps * plan.step.samples / plan.data.samples:.2g} epochs"
    if plan.speed is None or plan.seconds is None:
        return "run", f"{text}; its time: --tokens-per-second N or --device NAME"
    return (
        "run",
        f"{text}; {duration(plan.seconds)} at {plan.speed.tokens_per_second:.4g} tokens/s, {plan.speed.because}",
    )


def memory_lines(plan: Plan) -> list[tuple[str, str]]:
    """Memory of a rank, by part."""
    counted = plan.sizes
    parts = {"weights": counted.weights, "Adam's moments": counted.moments, "moving average": counted.average}
    shown = ", ".join(f"{name} {gib(size / plan.shards)}" for name, size in parts.items() if size)
    rest = plan.peak - counted.state / plan.shards
    sharded = f", state in {plan.shards} shards" if plan.shards > 1 else ""
    return [
        ("memory", f"{gib(plan.peak)} of tensors on a rank{sharded}: {shown}, activations and gradients {gib(rest)}"),
        ("", f"gradients alone are {gib(counted.gradients / plan.shards)}; PyTorch, its context and holes come on top"),
    ]


def checkpoint_lines(plan: Plan) -> list[tuple[str, str]]:
    """Size of a checkpoint, and of all that are there at a time."""
    kept = f"keep_last={plan.keep_last}"
    if plan.keep_every_kept:
        kept += f", {plan.keep_every_kept} of keep_every"
    size = f"{plan.sizes.checkpoint / MB:.1f} MB ({plan.sizes.checkpoint} bytes)"
    return [("checkpoint", f"{size}; {plan.checkpoint_room / MB:.1f} MB for {kept} and the one being written")]


def measured_peak(size: float | None) -> str:
    """A peak that was measured; None: the memory was not enough."""
    return "out of memory" if size is None else gib(size)


def millions(count: int) -> str:
    """`12.3 M`."""
    return f"{count / 1e6:.3g} M"


def gib(size: float) -> str:
    """`1.25 GiB`."""
    return f"{size / GIB:.3g} GiB"


def flop(count: float) -> str:
    """`3.2 TFLOP`."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e9:.3g} GFLOP"


def duration(seconds: float) -> str:
    """`3 d 4 h`, `2 h 5 min`, `41 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"

"""How fast a step is: `python -m job.benchmark` measures the plain path and the fast one in turn.

`--compare A B` measures any two settings. A setting is a comma-separated list of configuration keys:
`--compare model.implementation=plain training.compile_model=true`. The plain model computes what the research code
does; with `baseline=stock` beside its key it is what a user puts together from the mmdit package: flash attention,
compiled blocks, no pass or head that no term needs. On a CPU each setting has a process of its own; the plain and the
stock model have malloc as it comes there, ours as the trainer sets it.
"""

from __future__ import annotations

from job.runtime.launcher_variables import tune_allocators

if __name__ == "__main__":
    tune_allocators()  # before torch is imported: it reads the variables once

import argparse
import platform
import sys
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from job.benchmarking import report, startup
from job.benchmarking.durability import checkpoint_stall, resume_seconds
from job.benchmarking.measure import Shape, compare
from job.benchmarking.paper import count
from job.benchmarking.profiling import profile_step
from job.benchmarking.ranks import step_seconds
from job.command import guarded
from job.errors import UsageError, UserError
from job.files import write_json

NO_CYCLE = "loss.cycle_text_weight=0,loss.cycle_latent_weight=0"
# LGDLM decodes the predicted latent whatever the cycle's weight is. A weight too small to show in the loss makes the
# baseline do so too.
NO_CYCLE_LGDLM = "loss.cycle_text_weight=1e-30,loss.cycle_latent_weight=0"
# What docs/explanation/speed.md tells of: mean row length as a part of --seq-len, and the keys of the plain and of the
# fast path.
TARGETS = {
    "all four terms, full rows": (1.0, "", ""),
    "all four terms, rows of 60%": (0.6, "", ""),
    "cycle weights zero, full rows": (1.0, f",{NO_CYCLE_LGDLM}", f",{NO_CYCLE}"),
}
STOCK = "model.implementation=plain,baseline=stock"
GROWTH = {
    "seq_len": (128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16),
    "n_blocks": (1, 2, 4, 8),
    "vocab": (4096, 8192, 16384, 32768),
    "ranks": (1, 2, 4),
}
STALL_PARAMETERS = (4_000_000, 40_000_000)
RESUME_SAMPLES = (10_000, 1_000_000, 100_000_000, 10_000_000_000)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m job.benchmark", description=(__doc__ or "").split("\n")[0])
    both = ["model.implementation=plain", "model.implementation=fast"]
    p.add_argument(
        "--compare",
        nargs="+",
        metavar="SETTING",
        default=both,
        help="settings as key=value,key=value; the first is the baseline",
    )
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys that all settings share")
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--seq-len", type=int, default=256)
    p.add_argument("--vocab", type=int, default=30522)
    p.add_argument("--latent-dim", type=int, default=768)
    p.add_argument("--fill", type=float, default=1.0, help="mean row length as a part of --seq-len (%(default)s)")
    p.add_argument("--repeats", type=int, default=9, help="steps of each setting (%(default)s)")
    p.add_argument("--grow", choices=sorted(GROWTH), help="measure along one axis and fit the exponent of the cost")
    p.add_argument("--values", type=int, nargs="+", help="places along the axis of --grow")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of --targets")
    peak = "the device's peak, for the model FLOPs utilization (MFU); without it known of the GPU, else measured"
    p.add_argument("--peak-tflops", type=float, help=peak)
    p.add_argument("--out", type=Path, help="write the figures as JSON here, and the plot of --grow beside it")
    instead = p.add_argument_group("instead of the speed of settings")
    told = "the speed-ups of docs/explanation/speed.md, over the plain and the stock model, in float32 and in bf16"
    instead.add_argument("--targets", action="store_true", help=told)
    on_paper = "count kernels, operations, bytes and memory of a step, for sizes that do not fit here"
    instead.add_argument("--paper", action="store_true", help=on_paper)
    profiled = "the N kernels (on a CPU: operators) that take most of a step of every setting"
    instead.add_argument("--profile", type=int, metavar="N", help=profiled)
    first_step = "seconds to the first step of the demo, the wait for data, the loader's rate"
    instead.add_argument("--startup", type=Path, metavar="DATA", help=first_step)
    stall = "the stall of a checkpoint, and resume time against the size of the data"
    instead.add_argument("--durability", action="store_true", help=stall)
    return p


def setting(shared: list[str], own: str, shape: Shape) -> dict[str, Any]:
    """Configuration values of a setting; hidden 512 and 4 blocks where it says nothing."""
    base = [
        "data.source=synthetic",
        "model.hidden_size=512",
        "model.n_blocks=4",
        "model.cond_dim=512",
        f"model.max_seq_len={shape.seq_len}",
    ]
    keys = base + shared + [key for key in own.split(",") if key]
    return OmegaConf.to_container(OmegaConf.from_dotlist(keys))  # type: ignore[return-value]


def measure(options: argparse.Namespace, shape: Shape, names: list[str], more: list[str]) -> dict[str, dict[str, Any]]:
    """Figures of the settings `names` at one shape, with `more` keys that they share."""
    settings = {name: setting(options.set + more, name, shape) for name in names}
    peak = options.peak_tflops * 1e12 if options.peak_tflops else None
    try:
        return compare(settings, shape, torch.device(options.device), options.repeats, peak)
    except BrokenProcessPool as error:
        raise UserError("a setting's process was killed, most likely for its memory; choose smaller sizes") from error


def targets(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Print and return the figures of every target."""
    results = {}
    for dtype in options.dtypes:
        for target, (fill, plain, fast) in TARGETS.items():
            # A user of the stock model leaves out the passes of a term of weight zero, as we do.
            names = [f"model.implementation=plain{plain}", f"{STOCK}{fast}", f"model.implementation=fast{fast}"]
            title = f"{target}, {dtype}"
            results[title] = measure(options, replace(shape, fill=fill), names, [f"training.dtype={dtype}"])
            print(f"\n{title}\n{report.table(results[title])}", flush=True)
    return results


def on_paper(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Print and return what a step of every setting asks of a device."""
    results = {}
    print(report.PAPER_HEADER)
    for name in options.compare:
        results[name] = count(setting(options.set, name, shape), shape)
        print(report.paper_line(name, results[name]), flush=True)
    return results


def profiles(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Print what takes the time in a step of every setting; returns seconds of each call by kernel and setting."""
    results = {}
    for name in options.compare:
        found = profile_step(setting(options.set, name, shape), shape, torch.device(options.device))
        print(f"\n{report.short(name)}\n{report.profile_table(found, options.profile)}", flush=True)
        results[name] = found.seconds
    return results


def grow(options: argparse.Namespace, shape: Shape) -> Mapping[int, report.Figures]:
    """Print and return figures along one axis."""
    results: dict[int, report.Figures] = {}
    for value in options.values or GROWTH[options.grow]:
        if options.grow == "ranks":
            results[value] = on_ranks(options, shape, value)
        elif options.grow == "n_blocks":
            results[value] = measure(options, shape, options.compare, [f"model.n_blocks={value}"])
        else:
            results[value] = measure(options, replace(shape, **{options.grow: value}), options.compare, [])
        if options.grow != "ranks":
            print(f"\n{options.grow} = {value}\n{report.table(results[value])}", flush=True)
    if len(results) > 1:
        for name in options.compare:
            seconds = [figures[name]["step_seconds"] for figures in results.values()]
            power = report.exponent(list(results), seconds)
            print(f"{name}: the cost of a step grows like {options.grow} to the power {power:.2f}")
    return results


def on_ranks(options: argparse.Namespace, shape: Shape, ranks: int) -> dict[str, dict[str, Any]]:
    """Print and return the seconds of a step of every setting on so many ranks."""
    figures = {}
    for name in options.compare:
        seconds = step_seconds(setting(options.set, name, shape), shape, options.device, ranks, options.repeats)
        figures[name] = {"step_seconds": seconds}
    told = ", ".join(f"{name} {f['step_seconds']:.3f} s" for name, f in figures.items())
    print(f"{ranks} ranks: {told}", flush=True)
    return figures


def durability(repeats: int) -> dict[str, Any]:
    """Print and return what checkpoints and resumes cost."""
    stalls = [checkpoint_stall(parameters, repeats) for parameters in STALL_PARAMETERS]
    resumes = {samples: resume_seconds(samples, repeats) for samples in RESUME_SAMPLES}
    print(report.durability_table(stalls, resumes))
    return {"stall": stalls, "resume": resumes}


def starts(data: Path, repeats: int) -> dict[str, Any]:
    """Print and return what a run costs before its first step, and its wait for data."""
    figures = startup.compare(data, repeats)
    print(report.startup_table(figures))
    made, taken = startup.loader_rate(data), figures["warm"]["tokens_per_second"]
    print(f"the loader alone makes {made:.0f} tokens a second in one process, the steps take {taken:.0f}")
    return figures | {"loader": {"tokens_per_second": made}}


def figures_of(options: argparse.Namespace, shape: Shape) -> Any:
    """Measure and print what the command line asks for; returns the figures."""
    if options.durability:
        return durability(options.repeats)
    if options.startup:
        return starts(options.startup, options.repeats)
    if options.paper:
        return on_paper(options, shape)
    if options.profile:
        return profiles(options, shape)
    if options.targets:
        return targets(options, shape)
    if options.grow:
        return grow(options, shape)
    figures = measure(options, shape, options.compare, [])
    print(report.table(figures))
    return figures


def machine_name(device: str) -> str:
    """What the figures were measured on. UserError for a GPU that is not there."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"--device {device}: give cpu, cuda or cuda:1") from error
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: give cpu, cuda or cuda:1")
    if kind == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch sees no GPU here; check the driver, or measure with --device cpu")
    return torch.cuda.get_device_name()


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line says."""
    options = parser().parse_args(arguments)
    if not 0 < options.fill <= 1 or options.repeats < 1 or (options.profile is not None and options.profile < 1):
        raise UsageError("--fill lies between 0 and 1, --repeats and --profile are at least 1")
    shape = Shape(options.batch, options.seq_len, options.vocab, options.latent_dim, options.fill)
    if options.out and options.out.is_dir():  # before minutes of measuring
        raise UsageError(f"--out {options.out}: is a directory; give a file to write")
    machine = machine_name(options.device)
    print(f"{machine}, torch {torch.__version__}, {shape}")
    figures = figures_of(options, shape)
    if options.out:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"machine": machine, "date": date, "torch": torch.__version__, "command": sys.argv, "figures": figures}
        write_json(options.out, record, indent=1)
        if options.grow:
            report.plot(options.grow, figures, options.out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(guarded(main))

"""How fast a step is: `python -m job.benchmark` measures the plain path and the fast one in turn; `--compare A B` any two settings.

A setting is a comma-separated list of configuration keys: `--compare model.implementation=plain training.compile_model=true`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from job.benchmarking import startup
from job.benchmarking.durability import checkpoint_stall, resume_seconds
from job.benchmarking.measure import Shape, compare
from job.benchmarking.paper import count
from job.benchmarking.ranks import step_seconds
from job.command import guarded
from job.errors import UsageError

# LGDLM decodes the predicted latent whatever the cycle's weight is: a baseline with a weight that does not show does so too.
TARGETS = {
    "all four terms, full rows": (1.0, "", ""),
    "all four terms, rows of 60%": (0.6, "", ""),
    "cycle weights zero, full rows": (
        1.0,
        ",loss.cycle_text_weight=1e-30,loss.cycle_latent_weight=0",
        ",loss.cycle_text_weight=0,loss.cycle_latent_weight=0",
    ),
}
GROWTH = {
    "seq_len": (128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16),
    "n_blocks": (1, 2, 4, 8),
    "vocab": (4096, 8192, 16384, 32768),
    "ranks": (1, 2, 4),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m job.benchmark", description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "--compare",
        nargs="+",
        metavar="SETTING",
        default=["model.implementation=plain", "model.implementation=fast"],
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
    p.add_argument(
        "--targets",
        action="store_true",
        help="instead: the speed-ups that the README tells, in float32 and beside them in bf16",
    )
    p.add_argument(
        "--paper",
        action="store_true",
        help="instead: count kernels, operations, bytes and memory of a step, for sizes that do not fit here",
    )
    p.add_argument(
        "--startup",
        type=Path,
        metavar="DATA",
        help="instead: seconds to the first step of the demo, the wait for data, the loader's rate",
    )
    p.add_argument(
        "--durability",
        action="store_true",
        help="instead: the stall of a checkpoint, and resume time against the size of the data",
    )
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--peak-tflops", type=float, help="the device's peak for the model FLOPs utilization")
    p.add_argument("--out", type=Path, help="write the figures as JSON here, and the plot of --grow beside it")
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
    return OmegaConf.to_container(OmegaConf.from_dotlist(base + shared + [part for part in own.split(",") if part]))  # type: ignore[return-value]


def measure(options: argparse.Namespace, shape: Shape, more: list[str]) -> dict[str, dict[str, Any]]:
    """Figures of all settings at one shape."""
    settings = {name: setting(options.set + more, name, shape) for name in options.compare}
    peak = options.peak_tflops * 1e12 if options.peak_tflops else None
    return compare(settings, shape, torch.device(options.device), options.repeats, peak)


def targets(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Print and return the figures of every target."""
    results = {}
    for name, (fill, plain, fast) in TARGETS.items():
        fast = f"model.implementation=fast{fast}"
        options.compare = [f"model.implementation=plain{plain}", fast, f"{fast},training.dtype=bf16"]
        results[name] = measure(options, replace(shape, fill=fill), [])
        print(f"\n{name}\n{table(results[name])}", flush=True)
    return results


def on_paper(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Print and return what a step of every setting asks of a device."""
    results = {}
    print(f"{'setting':<44} {'kernels':>8} {'TFLOP':>8} {'GB moved':>9} {'peak GiB':>9}")
    for name in options.compare:
        f = results[name] = count(setting(options.set, name, shape), shape)
        print(
            f"{name[:44]:<44} {f['kernels']:>8} {f['flops'] / 1e12:>8.1f} {f['bytes_moved'] / 1e9:>9.0f} {f['peak_gib']:>9.1f}",
            flush=True,
        )
    return results


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures for a person."""
    lines = [
        f"{'setting':<44} {'step s':>8} {'(min-max)':>17} {'tokens/s':>9} {'GFLOP/s':>8} {'GiB':>6} {'speed-up (min-max)':>20}"
        "  forward backward optimizer"
    ]
    for name, f in figures.items():
        spread = f"({f['step_seconds_min']:.3f}-{f['step_seconds_max']:.3f})"
        speedup = f"{f['speedup']:.2f} ({f['speedup_min']:.2f}-{f['speedup_max']:.2f})"
        parts = " ".join(f"{f['parts'][part]:8.3f}" for part in f["parts"])
        lines.append(
            f"{name[:44]:<44} {f['step_seconds']:8.3f} {spread:>17} {f['tokens_per_second']:9.0f} {f['flops_per_second'] / 1e9:8.1f} "
            f"{f['peak_memory_gib']:6.2f} {speedup:>20} {parts}" + (f"  MFU {f['mfu']:.1%}" if f["mfu"] else "")
        )
    return "\n".join(lines)


def exponent(xs: list[int], ys: list[float]) -> float:
    """Slope of log y over log x by least squares: y grows like x to this power."""
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / sum((x - mean_a) ** 2 for x in a)


def grow(options: argparse.Namespace, shape: Shape) -> dict[int, dict[str, dict[str, Any]]]:
    """Figures along one axis."""
    results = {}
    for value in options.values or GROWTH[options.grow]:
        if options.grow == "ranks":
            results[value] = {
                name: {
                    "step_seconds": step_seconds(
                        setting(options.set, name, shape), shape, options.device, value, options.repeats
                    )
                }
                for name in options.compare
            }
            print(
                f"{value} ranks: "
                + ", ".join(f"{name} {f['step_seconds']:.3f} s" for name, f in results[value].items()),
                flush=True,
            )
            continue
        here = replace(shape, **{options.grow: value}) if options.grow != "n_blocks" else shape
        results[value] = measure(options, here, [f"model.n_blocks={value}"] if options.grow == "n_blocks" else [])
        print(f"\n{options.grow} = {value}\n{table(results[value])}", flush=True)
    for name in options.compare if len(results) > 1 else []:
        power = exponent(list(results), [figures[name]["step_seconds"] for figures in results.values()])
        print(f"{name}: the cost of a step grows like {options.grow} to the power {power:.2f}")
    return results


def plot(options: argparse.Namespace, results: dict[int, dict[str, dict[str, Any]]], path: Path) -> None:
    """Seconds of a step along the axis, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in options.compare:
        axes.loglog(
            list(results), [figures[name]["step_seconds"] for figures in results.values()], marker="o", label=name
        )
    axes.set(xlabel=options.grow, ylabel="seconds of a step")
    axes.set_xticks(list(results), [str(value) for value in results])
    axes.xaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both", axis="y")
    axes.legend()
    figure.savefig(path)


def durability(repeats: int) -> dict[str, Any]:
    """Print and return what checkpoints and resumes cost."""
    stalls = [checkpoint_stall(parameters, repeats) for parameters in (4_000_000, 40_000_000)]
    print(f"{'parameters':>12} {'staged s':>10} {'blocking s':>11} {'torch.save s':>13}  blocking/staged")
    for s in stalls:
        print(
            f"{s['parameters']:>12} {s['staged_seconds']:>10.3f} {s['blocking_seconds']:>11.3f} {s['torch_save_seconds']:>13.3f}  "
            f"{s['blocking_seconds'] / s['staged_seconds']:.0f}"
        )
    resumes = {
        samples: resume_seconds(samples, repeats) for samples in (10_000, 1_000_000, 100_000_000, 10_000_000_000)
    }
    print(
        "samples -> seconds to the first batch: "
        + ", ".join(f"{samples:.0e} -> {seconds:.4f}" for samples, seconds in resumes.items())
    )
    return {"stall": stalls, "resume": resumes}


def starts(data: Path, repeats: int) -> dict[str, Any]:
    """Print and return what a run costs before its first step, and its wait for data."""
    figures = startup.compare(data, repeats)
    print(f"{'':<22} {'first step s':>12} {'step s':>8} {'waiting for data':>17}")
    for name, f in figures.items():
        print(f"{name:<22} {f['first_step_seconds']:>12.1f} {f['step_seconds']:>8.3f} {f['data_wait']:>17.2%}")
    rate = startup.loader_rate(data)
    print(
        f"the loader alone makes {rate:.0f} tokens a second in one process, the steps take {figures['warm']['tokens_per_second']:.0f}"
    )
    return figures | {"loader": {"tokens_per_second": rate}}


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line says."""
    options = parser().parse_args(arguments)
    if not 0 < options.fill <= 1 or options.repeats < 1:
        raise UsageError("--fill lies between 0 and 1, and --repeats is at least 1")
    shape = Shape(options.batch, options.seq_len, options.vocab, options.latent_dim, options.fill)
    machine = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"{machine}, torch {torch.__version__}, {shape}")
    if options.durability:
        results: Any = durability(options.repeats)
    elif options.startup:
        results = starts(options.startup, options.repeats)
    elif options.paper:
        results = on_paper(options, shape)
    elif options.targets:
        results = targets(options, shape)
    elif options.grow:
        results = grow(options, shape)
    else:
        results = measure(options, shape, [])
        print(table(results))
    if options.out:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"machine": machine, "date": date, "torch": torch.__version__, "command": sys.argv, "figures": results}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        if options.grow:
            plot(options, results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(guarded(main))

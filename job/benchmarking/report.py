"""What the benchmark prints and draws for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.benchmarking.profiling import Profile
from job.files import write_whole

Figures = Mapping[str, dict[str, Any]]  # by the name of the setting, as job.benchmarking.measure.compare gives them

NAME = 44  # characters of a setting's name that a table shows
KERNEL_NAME = 100


def short(name: str) -> str:
    """A setting's name as a table shows it: without the section that most keys have, and cut."""
    return name.replace("model.implementation=", "")[:NAME]


def table(figures: Figures) -> str:
    """A line per setting: seconds of a step with their spread, rates, memory, speed-up, and the parts of a step."""
    lines = [
        f"{'setting':<{NAME}} {'step s':>8} {'(min-max)':>17} {'tokens/s':>9} {'GFLOP/s':>8} {'MFU':>6} {'GiB':>6} "
        f"{'speed-up (min-max)':>20}  forward backward optimizer"
    ]
    for name, f in figures.items():
        spread = f"({f['step_seconds_min']:.3f}-{f['step_seconds_max']:.3f})"
        speedup = f"{f['speedup']:.2f} ({f['speedup_min']:.2f}-{f['speedup_max']:.2f})"
        parts = " ".join(f"{seconds:8.3f}" for seconds in f["parts"].values())
        lines.append(
            f"{short(name):<{NAME}} {f['step_seconds']:8.3f} {spread:>17} {f['tokens_per_second']:9.0f} "
            f"{f['flops_per_second'] / 1e9:8.1f} {f['mfu']:6.1%} {f['peak_memory_gib']:6.2f} {speedup:>20} {parts}"
        )
    return "\n".join(lines)


PAPER_HEADER = f"{'setting':<{NAME}} {'kernels':>8} {'TFLOP':>8} {'GB moved':>9} {'peak GiB':>9}"


def paper_line(name: str, f: dict[str, Any]) -> str:
    """What a step of a setting asks of a device (job.benchmarking.paper.count), below PAPER_HEADER."""
    return (
        f"{short(name):<{NAME}} {f['kernels']:>8} {f['flops'] / 1e12:>8.1f} "
        f"{f['bytes_moved'] / 1e9:>9.0f} {f['peak_gib']:>9.1f}"
    )


def profile_table(profile: Profile, count: int) -> str:
    """A line for each of the kernels that take most of a step."""
    calls = sum(len(seconds) for seconds in profile.seconds.values())
    total = sum(sum(seconds) for seconds in profile.seconds.values())
    lines = [
        f"{calls} calls of {total * 1e3:.1f} ms in all; "
        f"something ran in {profile.busy * 1e3:.1f} of {profile.whole * 1e3:.1f} ms",
        f"{'ms':>9} {'calls':>6} {'us a call':>10}  kernel",
    ]
    for name, seconds in sorted(profile.seconds.items(), key=lambda item: -sum(item[1]))[:count]:
        whole = sum(seconds)
        lines.append(f"{whole * 1e3:>9.2f} {len(seconds):>6} {whole / len(seconds) * 1e6:>10.1f}  {name[:KERNEL_NAME]}")
    return "\n".join(lines)


def durability_table(stalls: list[dict[str, float]], resumes: dict[int, float]) -> str:
    """How long training waits for a save, by the number of parameters; and for a resume, by that of samples."""
    lines = [f"{'parameters':>12} {'staged s':>10} {'blocking s':>11} {'torch.save s':>13}  blocking/staged"]
    lines += [
        f"{s['parameters']:>12} {s['staged_seconds']:>10.3f} {s['blocking_seconds']:>11.3f} "
        f"{s['torch_save_seconds']:>13.3f}  {s['blocking_seconds'] / s['staged_seconds']:.0f}"
        for s in stalls
    ]
    found = ", ".join(f"{samples:.0e} -> {seconds:.4f}" for samples, seconds in resumes.items())
    return "\n".join([*lines, f"samples -> seconds to the first batch: {found}"])


def startup_table(figures: Figures) -> str:
    """Seconds to the first step, of the steps after it, and how much of those is waiting for data."""
    lines = [f"{'':<22} {'first step s':>12} {'step s':>8} {'waiting for data':>17}"]
    lines += [
        f"{name:<22} {f['first_step_seconds']:>12.1f} {f['step_seconds']:>8.3f} {f['data_wait']:>17.2%}"
        for name, f in figures.items()
    ]
    return "\n".join(lines)


def exponent(xs: list[int], ys: list[float]) -> float:
    """Slope of log y over log x by least squares: y grows like x to this power."""
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = sum(log_x) / len(log_x), sum(log_y) / len(log_y)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(log_x, log_y, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in log_x)


def plot(axis: str, results: dict[int, Figures], path: Path) -> None:
    """Draw seconds of a step along an axis, both logarithmic, a line per setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in next(iter(results.values())):
        seconds = [figures[name]["step_seconds"] for figures in results.values()]
        axes.loglog(list(results), seconds, marker="o", label=name)
    axes.set(xlabel=axis, ylabel="seconds of a step")
    axes.set_xticks(list(results), [str(value) for value in results])
    axes.xaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both", axis="y")
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png"))

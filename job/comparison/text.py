"""A comparison as text: the runs, then a table for every metric that several seeds have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from job.comparison.compared import Comparison, Figures, words_of
from job.comparison.runs import Run, shown
from job.comparison.statistics import LEAST_PAIRS, Estimate
from job.tables import aligned

UNKNOWN = "-"


def as_text(comparison: Comparison) -> str:
    """The whole comparison."""
    parts = [summary(comparison), "\n".join(runs_table(comparison))]
    if any(len(figures.by_seed) > 1 for lines in comparison.metrics.values() for figures in lines):
        parts += ["\n".join(metric_table(comparison, metric)) for metric in comparison.metrics]
    if comparison.notes:
        parts.append("\n".join(f"note: {note}" for note in comparison.notes))
    return "\n\n".join(parts)


def summary(comparison: Comparison) -> str:
    """How many runs of how many settings, and in what they differ."""
    runs, settings = len(comparison.runs), len(comparison.settings)
    seeds = len({run.seed for run in comparison.runs})
    differ = f"they differ in {', '.join(comparison.keys)}" if comparison.keys else "no key differs"
    return f"{counted(runs, 'run')}, {counted(settings, 'setting')}, {counted(seeds, 'seed')}; {differ}"


def counted(number: int, thing: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def runs_table(comparison: Comparison) -> list[str]:
    """A line a run: its settings, how far it came, and its figures."""
    paths = short_paths([run.path for run in comparison.runs])
    header = [*comparison.keys, "seed", "step", *comparison.metrics, "run"]
    rows = [header]
    for setting in comparison.settings:
        for run in setting.runs:
            figures = [number(run.figure(metric, comparison.step)) for metric in comparison.metrics]
            values = [shown(setting.values[key]) for key in comparison.keys]
            rows.append([*values, str(run.seed), steps_shown(run, comparison.step), *figures, paths[run.path]])
    return aligned(rows)


def steps_shown(run: Run, step: int | None) -> str:
    """The step that the figures are of, where one was asked for; else those done, of those to do if it goes on."""
    if step is not None:
        return str(step)
    return str(run.steps) if run.finished else f"{run.steps}/{run.target_steps}"


def short_paths(paths: Sequence[Path]) -> dict[Path, str]:
    """Paths without what all begin with."""
    if len(paths) == 1:
        return {paths[0]: str(paths[0])}
    common = os.path.commonpath([path.absolute() for path in paths])
    return {path: os.path.relpath(path.absolute(), common) for path in paths}


def metric_table(comparison: Comparison, metric: str) -> list[str]:
    """A line a setting: mean and interval over seeds, and the difference to the baseline over common seeds."""
    words = words_of(metric)
    rows = [["setting", "seeds", "mean", "95% interval", "difference", "95% interval", "pairs", "p"]]
    rows += [metric_row(figures) for figures in comparison.metrics[metric]]
    title = f"{metric}: {words}" if words else metric
    against = f", differences to {comparison.baseline.label}" if len(comparison.settings) > 1 else ""
    return [title + against, *(f"  {line}" for line in aligned(rows))]


def metric_row(figures: Figures) -> list[str]:
    """The cells of a setting."""
    row = [figures.setting.label, str(len(figures.by_seed))]
    row += [number(figures.estimate.mean), interval(figures.estimate)] if figures.estimate else [UNKNOWN, UNKNOWN]
    difference = figures.difference
    if difference is None:
        return [*row, "", "", "", ""]
    found = difference.estimate
    return [
        *row,
        number(found.mean, sign=True),
        interval(found, sign=True),
        str(found.count),
        chance(difference.p, found.count),
    ]


def chance(p: float | None, pairs: int) -> str:
    """The p of a sign-flip test, or why there is none."""
    if p is not None:
        return f"{p:.3f}"
    return f"too few seeds ({pairs} of the {LEAST_PAIRS} needed)" if pairs < LEAST_PAIRS else UNKNOWN


def interval(found: Estimate, sign: bool = False) -> str:
    """`0.51 to 0.55`."""
    if found.low is None or found.high is None:
        return UNKNOWN
    return f"{number(found.low, sign)} to {number(found.high, sign)}"


def number(value: float | None, sign: bool = False) -> str:
    """Four significant digits."""
    if value is None:
        return UNKNOWN
    return f"{value:+.4g}" if sign else f"{value:.4g}"

"""A comparison as one HTML file: every metric against the swept value, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from job.comparison.compared import Comparison, Figures, words_of
from job.comparison.runs import shown
from job.comparison.text import counted, metric_row, number, short_paths, steps_shown, summary
from job.pages.blocks import Folded, Table, Text
from job.pages.page import Page, Section, write_page
from job.pages.plots import Plot

TEST = (
    "Bars are 95% BCa bootstrap intervals of the mean over seeds; p is of a sign-flip test of the differences to the "
    "baseline, seed by seed. Each p stands alone: of twenty comparisons without any effect one is below 0.05."
)


def write_comparison(path: Path, comparison: Comparison) -> int:
    """Write the page, whole or not at all; returns its size in bytes."""
    title = f"Comparison of {counted(len(comparison.runs), 'run')}"
    notes = [Text(note, kind="note") for note in comparison.notes]
    sections = [
        Section("What differs", [Text(summary(comparison)), *notes]),
        Section("Figures", [metric_plot(comparison, metric) for metric in comparison.metrics]),
        Section("Seed by seed", [Text(TEST), *(metric_block(comparison, metric) for metric in comparison.metrics)]),
        Section("Runs", [runs_block(comparison)]),
    ]
    return write_page(path, Page(title, f"by {comparison.by}" if comparison.by else "", sections))


def metric_plot(comparison: Comparison, metric: str) -> Plot:
    """Means with intervals, and the seeds' own figures, against the swept value or the settings."""
    lines = comparison.metrics[metric]
    traces: list[Mapping[str, Any]] = []
    for name, part in parts(comparison, lines).items():
        traces += traces_of(name, comparison, part)
    axis: dict[str, Any] = {"title": {"text": comparison.by or ""}, "automargin": True}
    if not is_numeric(comparison):
        axis |= {"type": "category"}
    layout = {"xaxis": axis, "yaxis": {"title": {"text": metric}}, "showlegend": len(traces) > 2}
    return Plot(metric, traces, layout, words_of(metric))


def parts(comparison: Comparison, lines: Sequence[Figures]) -> dict[str, list[Figures]]:
    """The settings by what differs besides the swept key: a line of the plot for each."""
    found: dict[str, list[Figures]] = {}
    for figures in lines:
        others = {key: value for key, value in figures.setting.values.items() if key != comparison.by}
        name = " ".join(f"{key}={shown(value)}" for key, value in others.items()) if comparison.by else ""
        found.setdefault(name, []).append(figures)
    return found


def traces_of(name: str, comparison: Comparison, lines: Sequence[Figures]) -> list[dict[str, Any]]:
    """Two traces of Plotly: means with their intervals, and a point for every seed."""
    known = [figures for figures in lines if figures.estimate is not None]
    places = [place(comparison, figures) for figures in known]
    means = [figures.estimate.mean for figures in known if figures.estimate]
    above = [0.0 if f.estimate is None or f.estimate.high is None else f.estimate.high - f.estimate.mean for f in known]
    below = [0.0 if f.estimate is None or f.estimate.low is None else f.estimate.mean - f.estimate.low for f in known]
    seeds = [(at, seed, value) for at, f in zip(places, known, strict=True) for seed, value in f.by_seed.items()]
    mean = {
        "type": "scatter",
        "mode": "lines+markers" if comparison.by else "markers",
        "name": name or "mean",
        "x": places,
        "y": means,
        "error_y": {"type": "data", "symmetric": False, "array": above, "arrayminus": below},
    }
    single = {
        "type": "scatter",
        "mode": "markers",
        "name": f"{name} seeds".strip(),
        "x": [at for at, _, _ in seeds],
        "y": [value for _, _, value in seeds],
        "text": [f"seed {seed}" for _, seed, _ in seeds],
        "marker": {"size": 6, "opacity": 0.75, "symbol": "circle-open"},
    }
    return [mean, single]


def is_numeric(comparison: Comparison) -> bool:
    """Whether the swept values are numbers."""
    by = comparison.by
    return by is not None and all(
        isinstance(setting.values[by], int | float) and not isinstance(setting.values[by], bool)
        for setting in comparison.settings
    )


def place(comparison: Comparison, figures: Figures) -> Any:
    """Where a setting stands on the x axis."""
    if comparison.by is None:
        return figures.setting.label
    value = figures.setting.values[comparison.by]
    return float(value) if is_numeric(comparison) else shown(value)


def metric_block(comparison: Comparison, metric: str) -> Folded:
    """The table of one metric."""
    columns = ["setting", "seeds", "mean", "95% interval", "difference", "95% interval", "pairs", "p"]
    rows = [metric_row(figures) for figures in comparison.metrics[metric]]
    title = f"{metric}, differences to {comparison.baseline.label}"
    return Folded(title, Table(columns, rows, numbers=(1, 2, 4, 6)), is_open=len(comparison.metrics) == 1)


def runs_block(comparison: Comparison) -> Table:
    """A line a run."""
    paths = short_paths([run.path for run in comparison.runs])
    columns = [*comparison.keys, "seed", "step", *comparison.metrics, "run"]
    rows = []
    for run in (run for setting in comparison.settings for run in setting.runs):
        values = [shown(run.settings.get(key)) for key in comparison.keys]
        figures = [number(run.figure(metric, comparison.step)) for metric in comparison.metrics]
        rows.append([*values, str(run.seed), steps_shown(run, comparison.step), *figures, paths[run.path]])
    first = len(comparison.keys)
    return Table(columns, rows, numbers=tuple(range(first, len(columns) - 1)))

"""curves.png: what a run's two logs hold, against steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from job.files import json_lines, write_whole
from job.metric_names import EVALUATION, LOSS_TERMS, TRAINING_BY_KEY, at_timesteps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LogLine = dict[str, float]
LOGS = {"training": "training_log.jsonl", "evaluation": "evaluation.jsonl"}  # of a run directory
COLUMNS = 3
MARKED = 30  # fewer points than this are marked: a line of one or two would not be seen
WEIGHTS = "weights of the cycle terms"


@dataclass
class CurvePanel:
    """A panel: the keys of one log that it draws."""

    title: str
    log: Literal["training", "evaluation"]
    keys: Sequence[str]


def curve_panels(evaluations: Sequence[LogLine] = ()) -> list[CurvePanel]:
    """Every panel, in the order in which the metric table names their titles.

    The timesteps that the evaluation measures at are read from its log.
    """
    training: defaultdict[str, list[str]] = defaultdict(list)
    evaluation: defaultdict[str, list[str]] = defaultdict(list)
    for term in LOSS_TERMS:
        training[term.curves].append(term.key)
    training[WEIGHTS] = [term.weight_key for term in LOSS_TERMS if term.ramp]
    for metric in TRAINING_BY_KEY.values():
        training[metric.curves].append(metric.key)
    for metric in EVALUATION:
        evaluation[metric.curves].append(metric.key)
        if metric.curves_by_timestep:
            timesteps = {t for line in evaluations for t in at_timesteps(metric.key, line)}
            evaluation[metric.curves] += [f"{metric.key}@{t}" for t in sorted(timesteps, key=float, reverse=True)]
    return [
        *(CurvePanel(title, "training", keys) for title, keys in training.items() if title),
        *(CurvePanel(title, "evaluation", keys) for title, keys in evaluation.items() if title),
    ]


def write_curves(run_dir: Path, out: Path | None = None) -> Path:
    """Draw both logs of a run directory, as far as they go, into its curves.png or `out`, whole or not at all.

    Returns the file's path. A metric that a log does not hold, and a panel without any, is left out.
    """
    from matplotlib.figure import Figure  # half a second to load, for rank 0 alone, at its end

    out = out or run_dir / "curves.png"
    logs: dict[str, list[LogLine]] = {log: json_lines(run_dir / name) for log, name in LOGS.items()}
    panels = [
        panel
        for panel in curve_panels(logs["evaluation"])
        if any(key in line for line in logs[panel.log] for key in panel.keys)
    ]
    rows = max(1, math.ceil(len(panels) / COLUMNS))
    width, height = 5 * COLUMNS, 3 * rows + 0.4  # inches
    figure = Figure(figsize=(width, height))
    # Fixed margins: matplotlib's layout engines draw everything once more to find them, seconds at the end of each run.
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 0.2 / width, bottom=0.5 / height, top=1 - 0.8 / height, wspace=0.2, hspace=0.4
    )
    figure.suptitle(run_dir.resolve().name, y=1 - 0.25 / height)
    for number, panel in enumerate(panels, start=1):
        draw(figure.add_subplot(rows, COLUMNS, number), panel, logs[panel.log])
    write_whole(out, lambda file: figure.savefig(file, format="png", dpi=100))
    return out


def draw(axes: Axes, panel: CurvePanel, log: Sequence[LogLine]) -> None:
    """One panel: its metrics against the steps of a log."""
    for key in panel.keys:
        points = [(line["step"], line[key]) for line in log if key in line]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=key, linewidth=1.2, marker="." if len(points) < MARKED else None)
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")

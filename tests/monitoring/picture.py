"""Draws the line panels of the run dashboard with matplotlib, from the dashboard's own queries to a Prometheus.

python tests/monitoring/picture.py URL RUN OUT.png [MINUTES]
"""

from __future__ import annotations

import io
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from stack import get  # which also finds the dashboards

from panels import Panel, Query
from run_panels import OVERVIEW

COLUMNS, POINTS = 4, 120
Corner = Literal["best", "lower right"]
Line = dict[float, float]
Ask = Callable[[str, float, float, float], list[dict[str, Any]]]


def substitute(expression: str, run: str, window: str) -> str:
    """What Grafana makes of its variables."""
    return (
        expression.replace("$__rate_interval", window)
        .replace("$run", run)
        .replace("$rank", ".+")
        .replace("$sweep", run)
    )


def draw(path: Path, ask: Ask, run: str, end: float, seconds: float, window: str) -> None:
    """The line panels over the last `seconds` before `end`; `window` is Grafana's $__rate_interval."""
    panels = [panel for section in OVERVIEW for panel in section.panels if panel.kind in ("lines", "stacked")]
    start = end - seconds
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.5 * rows), layout="constrained")
    figure.suptitle(f"Cyclevae: run {run}")

    def answers(panel: Panel, queries: Sequence[Query]) -> dict[str, Line]:
        """The series of some queries of a panel by their legends, against minutes since the start."""
        lines = {}
        for query, legend in queries:
            for series in ask(substitute(query, run, window), start, end, seconds / POINTS):
                name = legend_of(legend, series["metric"]).replace(run, "").strip() or panel.title.lower()
                lines[name] = {(float(t) - start) / 60: float(value) for t, value in series["values"]}
        return lines

    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        axes.set_title(panel.title, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize="small")
        if panel.kind == "stacked":
            stack(axes, answers(panel, panel.queries))
        else:
            plot(axes, answers(panel, panel.queries))
        if panel.right:
            plot(axes.twinx(), answers(panel, panel.right), linestyle="--", legend="lower right")
    image = io.BytesIO()
    figure.savefig(image, dpi=70)
    Image.open(image).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)  # a small file


def legend_of(legend: str, labels: Mapping[str, str]) -> str:
    """A legend with the labels of a series in place of {{label}}."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend)


def stack(axes: Axes, lines: Mapping[str, Line]) -> None:
    times = sorted({t for line in lines.values() for t in line})
    values = [[line.get(t, 0.0) for t in times] for line in lines.values()]
    axes.stackplot(times, values, labels=list(lines), alpha=0.6)
    finish(axes, "best")


def plot(axes: Axes, lines: Mapping[str, Line], linestyle: str = "-", legend: Corner = "best") -> None:
    for name, line in lines.items():
        axes.plot(list(line), list(line.values()), label=name, linewidth=1.2, linestyle=linestyle)
    finish(axes, legend)


def finish(axes: Axes, legend: Corner) -> None:
    axes.ticklabel_format(useOffset=False)
    axes.legend(fontsize="xx-small", loc=legend)


def main() -> None:
    url, run, out, *minutes = sys.argv[1:]

    def ask(query: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = get(
            f"{url}/api/v1/query_range", query=query, start=f"{start}", end=f"{end}", step=f"{step}"
        )["data"]["result"]
        return result

    draw(Path(out), ask, run, time.time(), 60 * float(minutes[0] if minutes else 10), "30s")


if __name__ == "__main__":
    main()

"""Draws a dashboard's panels with matplotlib, from the dashboard's own queries: `python tests/monitoring/picture.py URL RUN OUT.png [MINUTES]`."""

from __future__ import annotations

import io
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from job.monitoring.panels import OVERVIEW, Panel

COLUMNS, POINTS = 4, 120
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
    """The line panels of the run dashboard over the last `seconds` before `end`."""
    panels = [panel for _, row in OVERVIEW for panel in row if panel.kind in ("lines", "stacked")]
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.5 * rows), layout="constrained")
    figure.suptitle(f"Cyclevae: run {run}")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        axes.set_title(panel.title, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize="small")
        plot(
            axes,
            panel,
            panel.queries,
            lambda query: ask(substitute(query, run, window), end - seconds, end, seconds / POINTS),
            run,
            end - seconds,
        )
        if panel.right:
            plot(
                axes.twinx(),
                panel,
                panel.right,
                lambda query: ask(substitute(query, run, window), end - seconds, end, seconds / POINTS),
                run,
                end - seconds,
                linestyle="--",
            )
    image = io.BytesIO()
    figure.savefig(image, dpi=70)
    Image.open(image).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)  # a small file


def plot(
    axes: Axes,
    panel: Panel,
    queries: Any,
    ask: Callable[[str], list[dict[str, Any]]],
    run: str,
    start: float,
    **style: Any,
) -> None:
    """The series of some queries, named by their legends."""
    lines: dict[str, dict[float, float]] = {}
    for query, legend in queries:
        for series in ask(query):
            name = (
                re.sub(r"\{\{(\w+)\}\}", lambda match, labels=series["metric"]: labels.get(match[1], ""), legend)
                .replace(run, "")
                .strip()
            )  # type: ignore[misc]
            lines[name or panel.title.lower()] = {
                (float(t) - start) / 60: float(value) for t, value in series["values"]
            }
    times = sorted({t for line in lines.values() for t in line})
    if panel.kind == "stacked":
        axes.stackplot(
            times, [[line.get(t, 0.0) for t in times] for line in lines.values()], labels=list(lines), alpha=0.6
        )
    else:
        for name, line in lines.items():
            axes.plot(list(line), list(line.values()), label=name, linewidth=1.2, **style)
    axes.ticklabel_format(useOffset=False)
    axes.legend(fontsize="xx-small", loc="best" if not style else "lower right")


def main() -> None:
    from stack import get

    url, run, out, *minutes = sys.argv[1:]

    def ask(query: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = get(
            f"{url}/api/v1/query_range", query=query, start=f"{start}", end=f"{end}", step=f"{step}"
        )["data"]["result"]
        return result

    draw(Path(out), ask, run, time.time(), 60 * float(minutes[0] if minutes else 10), "30s")


if __name__ == "__main__":
    main()

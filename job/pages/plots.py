"""Plots of a page: what Plotly draws, as plain data. Colours, fonts and margins are page.js's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Points = tuple[Sequence[float], Sequence[float]]  # x and y
MARKED = 30  # fewer points than this are marked: a line of one or two would not be seen
MOST_POINTS = 1500  # of a curve; more would make pages of megabytes and cannot be told apart
DIGITS = 6  # of a number


@dataclass(frozen=True)
class Plot:
    """A plot with a title above and a line of explanation below it."""

    title: str
    traces: Sequence[Mapping[str, Any]]  # of Plotly
    layout: Mapping[str, Any] = field(default_factory=dict)  # of Plotly, over the page's own
    caption: str = ""
    block: str = field(default="plot", init=False)


def curves(
    title: str,
    lines: Mapping[str, Points],
    *,
    unit: str = "",
    x_title: str = "step",
    caption: str = "",
    dashed: Sequence[str] = (),
) -> Plot:
    """Lines by their names in the legend. Points that are not finite are gaps. `dashed` names lines drawn so."""
    traces = []
    for name, (x, y) in lines.items():
        x, y = thinned(x), thinned(y)
        style = {"width": 1.6, "dash": "dash" if name in dashed else "solid"}
        mode = "lines+markers" if len(x) < MARKED else "lines"
        traces.append({"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, "line": style})
    layout = {
        "hovermode": "x unified",
        "xaxis": {"title": {"text": x_title}},
        "yaxis": {"title": {"text": unit}},
        "showlegend": True,
    }
    return Plot(title, traces, layout, caption)


def bars(title: str, values: Mapping[str, float], *, unit: str = "", caption: str = "") -> Plot:
    """A horizontal bar for each value, the first one on top."""
    names = list(values)
    trace = {"type": "bar", "orientation": "h", "y": names, "x": [values[name] for name in names]}
    layout = {
        "xaxis": {"title": {"text": unit}},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "showlegend": False,
    }
    return Plot(title, [trace], layout, caption)


def thinned(values: Sequence[float]) -> list[float]:
    """Every k-th value, so that at most MOST_POINTS are left, and the last one."""
    stride = math.ceil(len(values) / MOST_POINTS) or 1
    kept = list(values[::stride])
    if stride > 1 and (len(values) - 1) % stride:
        kept.append(values[-1])
    return kept


def as_json(plots: Sequence[Plot]) -> str:
    """Plots for page.js, safe inside a <script>: no `<` is left that could end it."""
    values = [{"traces": plain(plot.traces), "layout": plain(plot.layout)} for plot in plots]
    return json.dumps(values, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def plain(value: Any) -> Any:
    """A value for JSON: what is not finite becomes null, a gap; other numbers keep DIGITS digits."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value

"""What dashboards are made of: panels with their queries, as plain data.

`$run`, `$rank` and `$sweep` in queries are the dashboards' variables; `{{label}}` in a legend is a label of the series.
Units, descriptions and what belongs together come from the table of metrics (job/metric_names.py) wherever a panel
shows a metric as it is; only panels that compute something say it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from job.metric_names import METRICS, Metric

OF_RUN, OF_RANK = 'run=~"$run"', 'run=~"$run",rank=~"$rank"'
OF_SWEEP, OF_ANY_RUN = 'run=~"$sweep"', 'run=~".+"'
FIRING = 'ALERTS{alertname=~"Cyclevae.+",alertstate="firing"}'
GRAFANA_UNITS = {"ratio": "percentunit", "seconds": "s", "bytes": "bytes", "tokens per second": "short"}  # else none

Query = tuple[str, str]  # expression, legend


@dataclass(frozen=True)
class Panel:
    """A panel; `right` are queries that are drawn against the right axis. For a table the legend is the column."""

    title: str
    unit: str  # of Grafana
    queries: Sequence[Query]
    help: str
    kind: Literal["lines", "stacked", "number", "table"] = "lines"
    right: Sequence[Query] = ()
    width: int = 8


@dataclass(frozen=True)
class Section:
    """Panels below a heading."""

    heading: str
    panels: Sequence[Panel]


def by_run(name: str, matchers: str = OF_RUN, by: str = "run") -> str:
    """A metric of runs, without the labels that a restart changes: so its line goes on when a job is started again."""
    return f"max by ({by}) (cyclevae_{name}{{{matchers}}})"


def metric(name: str) -> Metric:
    return METRICS[f"cyclevae_{name}"]


def unit_of(shown: Metric) -> str:
    return GRAFANA_UNITS.get(shown.unit, "none")


def line(title: str, name: str, matchers: str = OF_RUN, width: int = 8) -> Panel:
    """A metric of the run, a line for each run."""
    shown = metric(name)
    return Panel(title, unit_of(shown), [(by_run(name, matchers), "{{run}}")], shown.help, width=width)


def number(title: str, name: str) -> Panel:
    """A metric of the run as a number."""
    shown = metric(name)
    return Panel(title, unit_of(shown), [(by_run(name), "{{run}}")], shown.help, "number", width=4)

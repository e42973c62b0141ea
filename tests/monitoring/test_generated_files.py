"""Dashboards and rules: generated from code, they ask for metrics that exist and are what Grafana reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from job.metric_names import EVALUATION, METRICS
from rules import Durations, alerts, recordings
from run_panels import HELD_OUT_TEXT, OVERVIEW
from sweep_and_cluster_panels import CLUSTER, COMPARISON

pytest.importorskip("grafana_foundation_sdk")
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

import generate_monitoring
from dashboards import dashboards


def test_panels_and_alerts_ask_for_metrics_that_exist() -> None:
    d = Durations(1)
    sections = (*OVERVIEW, *COMPARISON, *CLUSTER)
    panels = [panel for section in sections for panel in section.panels]
    expressions = [query for panel in panels for query, _ in (*panel.queries, *panel.right)]
    expressions += [*recordings(d).values(), *(f"{alert.signal} {alert.condition}" for alert in alerts(d))]
    known = {*METRICS, *(f"cyclevae_step_duration_seconds_{part}" for part in ("bucket", "sum", "count"))}
    for expression in expressions:
        assert set(re.findall(r"\bcyclevae_\w+", expression)) <= known
        assert set(re.findall(r"\bcyclevae:[\w:]+", expression)) <= set(recordings(d))


def test_every_metric_of_the_evaluation_is_in_a_panel() -> None:
    queries = " ".join(query for panel in HELD_OUT_TEXT.panels for query, _ in panel.queries)
    assert [metric.name for metric in EVALUATION if f"({metric.name}{{" not in queries] == []


def test_generated_files_are_those_checked_in() -> None:
    generated = generate_monitoring.files()
    root = Path(__file__).parents[2]
    assert {name: (root / name).read_text() for name in generated} == generated, "run `make generate`"


def test_dashboards_have_no_field_that_grafana_does_not_know() -> None:
    for name, board in dashboards().items():
        values = json.loads(board)
        assert json.loads(json.dumps(Dashboard.from_json(values), cls=JSONEncoder)) == values
        cells = {
            (x, y)
            for p in values["panels"]
            for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
            for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
        }
        assert len(cells) == sum(p["gridPos"]["w"] * p["gridPos"]["h"] for p in values["panels"]), (
            f"panels overlap in {name}"
        )
        assert max(x for x, _ in cells) < 24

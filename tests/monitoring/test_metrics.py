"""Every number of the logs is a metric, every metric is well named, and panels and alerts ask for what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch.utils.flop_counter import FlopCounterMode

from job.config import Config, ModelConfig
from job.model.build import build_model
from job.monitoring.accumulator import STEP_METRICS
from job.monitoring.exporter import Metrics
from job.monitoring.flops import Done, Work, pass_flops
from job.monitoring.goodput import Goodput
from job.monitoring.metrics import METRICS, RANK, TERMS, evaluation_series, training_series
from job.monitoring.panels import CLUSTER, COMPARISON, OVERVIEW
from job.monitoring.rules import Durations, alerts, recordings
from job.objective.evaluation import NOISY_T, ROWS


def test_names_follow_the_conventions() -> None:
    for metric in METRICS.values():
        assert re.fullmatch(r"cyclevae(_[a-z0-9]+)+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert not re.search(r"_(ms|milliseconds|percent|mb|gb|kb)(_|$)", metric.name)
        assert metric.help.endswith(".")
        assert len(metric.labels) <= 1 or metric.name.endswith("_info")
        for unit in ("seconds", "bytes"):
            if metric.unit == unit:
                assert f"_{unit}" in metric.name


def test_every_number_of_the_objective_is_exported() -> None:
    series = [training_series(name) for name in STEP_METRICS]
    assert None not in series
    assert len(set(series)) == len(series)
    assert set(TERMS.values()) < set(STEP_METRICS)
    evaluated = [
        evaluation_series(f"{name}{suffix}")
        for name in ROWS
        for suffix in ("", *(f"@{t}" for t in NOISY_T))
        if not suffix or "t2l/x0" in name
    ]
    assert len(set(evaluated)) == len(evaluated)
    assert evaluation_series("t2l/x0_cos@0.9") == ("cyclevae_eval_t2l_x0_cos", ("0.9",))
    assert all(len(METRICS[name].labels) == len(labels) for name, labels in [*evaluated, *filter(None, series)])


def test_panels_and_alerts_ask_for_metrics_that_exist() -> None:
    d = Durations(1)
    panels = [panel for rows in (OVERVIEW, COMPARISON, CLUSTER) for _, row in rows for panel in row]
    expressions = [query for panel in panels for query, _ in (*panel.queries, *panel.right)]
    expressions += [*recordings(d).values(), *(f"{alert.signal} {alert.condition}" for alert in alerts(d))]
    known = {*METRICS, *(f"cyclevae_step_duration_seconds_{part}" for part in ("bucket", "sum", "count"))}
    for expression in expressions:
        assert set(re.findall(r"\bcyclevae_\w+", expression)) <= known
        assert set(re.findall(r"\bcyclevae:[\w:]+", expression)) <= set(recordings(d))


def test_a_rank_exports_its_own_and_only_rank_0_the_runs() -> None:
    values = {
        (metric.name, ("x",) * len(metric.labels)): 2.0 for metric in METRICS.values() if metric.kind != "histogram"
    }
    for rank, expected in ((0, METRICS), (3, {metric.name for metric in RANK})):
        metrics = Metrics("sweep/lr=1", rank, dict)
        metrics.set(values)
        metrics.step_duration.observe(0.07)
        metrics.step_duration.observe(1000.0)
        families = list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))
        exported = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
        assert exported == set(expected)
        assert all(
            (s.labels["run"], s.labels["rank"]) == ("sweep/lr=1", str(rank))
            for family in families
            for s in family.samples
        )
        buckets = {s.labels["le"]: s.value for family in families for s in family.samples if s.name.endswith("_bucket")}
        assert (buckets["0.05"], buckets["0.1"], buckets["300"], buckets["+Inf"]) == (0, 1, 1, 2)


def test_goodput_tells_replayed_steps_from_new_ones(tmp_path: Path) -> None:
    path, seconds = tmp_path / "goodput.json", {"step": 10.0, "data_wait": 1.0, "checkpoint": 2.0, "evaluate": 3.0}
    before = Goodput.of(path)
    before.steps_done(0, 10, Done(100, 20, 1e9))
    before.time_spent(0, 10, seconds)
    before.write(path)
    after = Goodput.of(path)  # killed at step 10, goes on from the checkpoint of step 4
    for start, done in ((4, 8), (8, 12)):
        after.steps_done(start, done, Done(40, 8, 4e8))
        after.time_spent(start, done, seconds)
    assert (after.steps, after.replayed_steps, after.tokens, after.samples, after.furthest) == (18, 6, 180, 36, 12)
    assert after.seconds["replayed"] == 10 + 5
    assert after.seconds["productive"] == 10 + 5
    assert (after.seconds["waiting_for_data"], after.seconds["checkpointing"], after.seconds["evaluating"]) == (3, 6, 9)
    path.write_text('{"steps": 18, "rep')
    assert Goodput.of(path) == Goodput()


@pytest.mark.parametrize("kind", ["t2l", "l2t"])
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    """By a difference of two depths, so that what the plain model computes in vain in its last block drops out."""
    rows, length = 3, 12

    def formula(blocks: int) -> float:
        return pass_flops(config(blocks), np.full(rows, length), 32, 8)[kind] / 3  # the forward third

    def config(blocks: int) -> ModelConfig:
        return ModelConfig(
            hidden_size=32,
            n_blocks=blocks,
            n_heads=3,
            head_dim=8,
            cond_dim=24,
            max_seq_len=length,
            num_residual_streams=1,
            qk_rmsnorm=False,
        )

    def counted(blocks: int) -> float:
        model, t = build_model(config(blocks), 32, 8, seed=0), torch.zeros(rows)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(
                torch.zeros(rows, length, dtype=torch.int64),
                torch.zeros(rows, 8),
                t,
                t,
                torch.ones(rows, length, dtype=torch.bool),
                heads=("text",) if kind == "l2t" else ("latent",),
            )
        return counter.get_total_flops()

    assert counted(4) - counted(2) == formula(4) - formula(2)


def test_the_trunk_of_the_cluster_model_costs_what_was_measured() -> None:
    """1.6 GFLOP per token, forward and backward, at 512 tokens; six operations per parameter would say 4.84."""
    model = ModelConfig(hidden_size=1024, n_blocks=24, n_heads=8, head_dim=64, cond_dim=1024)
    flops = pass_flops(model, np.array([512]), vocab_size=0, latent_dim=0)["joint"]
    assert flops / 512 == pytest.approx(1.6e9, rel=0.08)


def test_work_adds_up() -> None:
    work, model = Work(Config().model, 100, 8), Config().model
    work.add(np.array([3, 5]), {"t2l": 2, "l2t": 1})
    work.add(np.array([4]), {"joint": 1})
    two, one = pass_flops(model, np.array([3, 5]), 100, 8), pass_flops(model, np.array([4]), 100, 8)
    done = work.read()
    assert (done.tokens, done.samples) == (12, 3)
    assert done.flops == pytest.approx(2 * two["t2l"] + two["l2t"] + one["joint"])
    assert work.read() == Done()


def test_generated_files_are_those_checked_in() -> None:
    generate = pytest.importorskip("job.monitoring.generate")
    root = Path(__file__).parents[2]
    assert {name: (root / name).read_text() for name in generate.files()} == generate.files(), (
        "run `python -m job.monitoring.generate`"
    )


def test_dashboards_have_no_field_that_grafana_does_not_know() -> None:
    dashboards = pytest.importorskip("job.monitoring.dashboards")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    for name, board in dashboards.dashboards().items():
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

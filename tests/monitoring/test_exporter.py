"""What a rank exports."""

from __future__ import annotations

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from job.metric_names import METRICS, OF_EACH_RANK
from job.monitoring.exporter import Metrics


def test_a_rank_exports_its_own_and_only_rank_0_the_runs() -> None:
    values = {
        (metric.name, ("x",) * len(metric.labels)): 2.0 for metric in METRICS.values() if metric.kind != "histogram"
    }
    for rank, expected in ((0, METRICS), (3, {metric.name for metric in OF_EACH_RANK})):
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

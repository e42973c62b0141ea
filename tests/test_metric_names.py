"""The table of metrics: every number of the logs is in it, under a name that Prometheus' conventions allow."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from job.config import MODES, LossConfig
from job.metric_names import (
    EVALUATION,
    LOSS_TERMS,
    METRICS,
    STEP_METRICS,
    STEP_PARTS,
    TRAINING_BY_KEY,
    evaluation_series,
    training_series,
)


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
    series = [training_series(key) for key in STEP_METRICS]
    series += [training_series(term.weight_key) for term in LOSS_TERMS]
    series += [training_series(f"{part}_seconds") for part in STEP_PARTS]
    assert None not in series
    assert len(set(series)) == len(series)
    evaluated = [evaluation_series(metric.key) for metric in EVALUATION]
    evaluated += [evaluation_series(f"{metric.key}@0.9") for metric in EVALUATION if metric.labels]
    assert len(set(evaluated)) == len(evaluated)
    assert evaluation_series("t2l/x0_cos@0.9") == ("cyclevae_eval_t2l_x0_cos", ("0.9",))
    assert evaluation_series("t2l/x0_cos") == ("cyclevae_eval_t2l_x0_cos", ("1",))
    assert all(len(METRICS[name].labels) == len(labels) for name, labels in [*evaluated, *filter(None, series)])


def test_no_key_is_of_two_metrics() -> None:
    shared = [*STEP_METRICS[: len(LOSS_TERMS)], *(term.weight_key for term in LOSS_TERMS)]
    shared += [f"{part}_seconds" for part in STEP_PARTS]
    assert len(set(shared)) == len(shared)
    assert not set(shared) & set(TRAINING_BY_KEY)
    assert len(TRAINING_BY_KEY) == sum(
        bool(metric.key) for metric in METRICS.values() if not metric.name.startswith("cyclevae_eval_")
    )


def test_step_times_are_shown_by_the_histogram_alone() -> None:
    assert training_series("step_seconds") is None


def test_the_columns_of_the_accumulator_are_those_of_existing_checkpoints() -> None:
    """Checkpoints hold the columns without names: in another order a resumed run would log one metric as another."""
    assert STEP_METRICS == (
        "loss",
        "base_l2t_text_loss",
        "base_t2l_latent_loss",
        "cycle_text_loss",
        "cycle_latent_loss",
        "text_loss",
        "latent_loss",
        "t_lat_mean",
        "latent_pred_norm",
        "x0_pred_norm",
        "grad_norm",
    )


def test_terms_name_modes_and_keys_of_the_configuration() -> None:
    config = LossConfig()
    for term in LOSS_TERMS:
        assert set(term.modes) <= {"cycle_vae", *MODES}
        assert all(hasattr(config, key) for key in (*term.ramp, *filter(None, [term.weight])))


def test_the_table_needs_no_torch() -> None:
    code = "import sys, job.metric_names, job.monitoring.evaluation_table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0

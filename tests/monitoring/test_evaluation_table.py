"""The evaluation in words: every metric has its line, and the verdicts follow from the figures."""

from __future__ import annotations

import math

from job.metric_names import EVALUATION
from job.monitoring.evaluation_table import IGNORED_LATENT_GAIN, IGNORED_TEXT_GAIN, headline, table, verdicts

METRICS = {metric.key: 0.5 for metric in EVALUATION} | {"samples": 256.0, "tokens": 4835.0}


def test_every_metric_has_a_line_in_the_tables_order() -> None:
    lines = table(METRICS).splitlines()
    assert lines[0] == "256 held-out texts, 4835 tokens"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [metric.key for metric in EVALUATION]
    assert (
        "  l2t/latent_gain                       0.5  what the right latent saves the decoder against another's, "
        in (table(METRICS))
    )
    assert "the nearest of 256 to the one predicted" in table(METRICS)  # the pool that it is retrieved from


def test_values_at_other_timesteps_stand_behind_those_at_1() -> None:
    words = table(METRICS | {"t2l/x0_cos@0.25": 0.75, "t2l/x0_cos@0.9": 0.6})
    assert "to the true one, at t=1 (at t=0.25: 0.750, 0.9: 0.600)" in words


def test_a_metric_that_was_not_measured_has_no_line() -> None:
    assert "pseudo/entropy" not in table({key: value for key, value in METRICS.items() if key != "pseudo/entropy"})


def test_the_headline_is_of_the_metrics_that_the_sweep_compares() -> None:
    assert headline(METRICS) == (
        "l2t/ce 0.500  l2t/latent_gain 0.500  t2l/x0_cos 0.500  t2l/text_gain 0.500  "
        "t2l2t/token_acc 0.500  t2l2t/exact_match 0.500  l2t2l/cos 0.500"
    )


def test_verdicts_change_at_the_thresholds() -> None:
    def said(**changed: float) -> list[str]:
        names = {
            "latent_gain": "l2t/latent_gain",
            "text_gain": "t2l/text_gain",
            "mse": "t2l/x0_mse",
            "accuracy": "t2l2t/token_acc",
        }
        return verdicts(METRICS | {names[name]: value for name, value in changed.items()})

    assert said()[0] == "the decoder uses the latent"
    assert said(latent_gain=IGNORED_LATENT_GAIN - 0.001)[0].startswith("the decoder ignores the latent")
    assert said(latent_gain=IGNORED_LATENT_GAIN + 0.001)[0] == "the decoder uses the latent"
    share = IGNORED_TEXT_GAIN / (1 - IGNORED_TEXT_GAIN)  # gain / (gain + mse) is the threshold at this gain and mse 1
    assert said(text_gain=0.99 * share, mse=1.0)[1].startswith("the encoder ignores the text")
    assert said(text_gain=1.01 * share, mse=1.0)[1] == "the encoder uses the text"
    assert said(accuracy=0.5)[2].startswith("text -> latent -> text is no better than guessing the most frequent token")
    assert said(accuracy=0.6)[2].startswith("text -> latent -> text gets 60.0% of the tokens right")
    assert said(text_gain=math.nan)[0].startswith("the model is broken")

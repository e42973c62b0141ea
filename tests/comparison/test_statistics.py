"""Intervals and the test are right where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from interval_coverage import coverage

from job.comparison import statistics
from job.comparison.statistics import COVERAGE, LEAST_PAIRS, difference, estimate


@pytest.mark.parametrize("values", [3, 6, 20])
@pytest.mark.parametrize("distribution", ["normal", "skewed"])
def test_intervals_hold_the_true_mean_as_often_as_is_told(distribution: str, values: int) -> None:
    """A part of interval_coverage.py, which measured what COVERAGE tells."""
    told = COVERAGE[values][["normal", "skewed"].index(distribution)]
    draws = 300
    assert coverage(distribution, values, draws) == pytest.approx(
        told, abs=3 * (told * (1 - told) / draws) ** 0.5 + 0.01
    )


def test_an_interval_follows_the_skew() -> None:
    """A symmetric interval around the mean of such values would reach as far down as up."""
    found = estimate(np.random.default_rng(0).exponential(size=20).tolist())
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.mean > 1.1 * (found.mean - found.low)


def test_values_that_tell_nothing_have_no_interval() -> None:
    assert estimate([1.0, 2.0]) == statistics.Estimate(1.5, None, None, 2)
    assert estimate([2.0] * 5) == statistics.Estimate(2.0, 2.0, 2.0, 5)
    assert estimate([1.0, 2.0, float("nan")]).low is None
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_the_sign_flip_test_counts_all_flips() -> None:
    """Of 2^6 flips two are as extreme as six differences of one sign; of these seven, six."""
    assert difference([(0.0, d) for d in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]).p == 2 / 64
    assert difference([(0.0, d) for d in (1.0, 1.0, 1.0, 1.0, 1.0, -1.0)]).p == pytest.approx(2 * 7 / 64)
    assert difference([(d, 0.0) for d in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]).estimate.mean == -3.5


def test_too_few_pairs_have_no_p() -> None:
    """The smallest p of five pairs would be 2 / 32, above 0.05 whatever the figures are."""
    pairs = [(0.0, 1.0 + seed) for seed in range(LEAST_PAIRS)]
    assert difference(pairs[:-1]).p is None
    assert difference(pairs).p is not None
    assert 2 / 2 ** (LEAST_PAIRS - 1) > statistics.SIGNIFICANT > 2 / 2**LEAST_PAIRS


def test_without_an_effect_few_tests_are_significant() -> None:
    generator = np.random.default_rng(0)
    found = [difference(generator.normal(size=(8, 2)).tolist()).p for _ in range(150)]
    significant = np.mean([p is not None and p < 0.05 for p in found])
    assert significant == pytest.approx(0.05, abs=0.04)
    many = difference([(0.0, value) for value in generator.normal(loc=2, size=statistics.EXACT_PAIRS + 1)])
    assert many.p is not None
    assert many.p < 0.01

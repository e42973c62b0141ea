"""What a few figures of the same setting, one a seed, say of its mean, and of two settings' difference.

Every number comes out the same each time: draws are made by a fixed seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of the intervals
LEAST_VALUES = 3  # for an interval: of two values every resample lies on a line between them
RESAMPLES = 9999
# How often a 95% interval of so many values holds the true mean: normal ones, and skewed ones (log-normal, sigma 0.5).
# Measured by tests/comparison/interval_coverage.py; tests/comparison/test_statistics.py repeats a part.
COVERAGE = {
    3: (0.73, 0.70),
    4: (0.81, 0.78),
    5: (0.85, 0.82),
    6: (0.87, 0.84),
    8: (0.89, 0.86),
    10: (0.90, 0.89),
    20: (0.93, 0.91),
}
# n signs can fall in 2^n ways, of which at best two, all plus and all minus, are as extreme as what was seen.
SIGNIFICANT = 0.05
LEAST_PAIRS = 6  # the smallest n with 2 / 2^n < SIGNIFICANT
EXACT_PAIRS = 16  # up to so many pairs all flips are counted, above them RESAMPLES are drawn


@dataclass(frozen=True)
class Estimate:
    """A mean, and the interval that is likely to hold the true one; None for fewer than LEAST_VALUES values."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """How a setting differs from another, over the seeds that both have."""

    estimate: Estimate
    p: float | None  # of the sign-flip test, two-sided; None for fewer than LEAST_PAIRS pairs


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of values and its BCa bootstrap interval (Efron 1987): corrected for bias, and for skewed values.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values")
    x = np.asarray(values, np.float64)
    mean = float(x.mean())
    if len(x) < LEAST_VALUES or not np.isfinite(x).all():
        return Estimate(mean, None, None, len(x))
    if np.ptp(x) == 0:  # a figure that no seed changes; BCa divides by its spread
        return Estimate(mean, mean, mean, len(x))
    low, high = intervals(x[None])
    return Estimate(mean, float(low[0]), float(high[0]), len(x))


def intervals(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends [N] of the BCa intervals of the means of rows [N, values]."""
    from scipy import stats  # here, because it takes a second to load, which each start of a run would pay for

    low, high = np.empty(len(x)), np.empty(len(x))
    for row, values in enumerate(x):
        found = stats.bootstrap(
            (values,),
            np.mean,
            confidence_level=LEVEL,
            n_resamples=RESAMPLES,
            method="BCa",
            rng=np.random.default_rng(row),
        ).confidence_interval
        low[row], high[row] = found.low, found.high
    return low, high


def difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    """The mean of second minus first in pairs of one seed, and how likely chance alone makes one as large.

    The test flips the signs of the differences in all ways (Fisher's randomization test): without an effect of the
    setting, each seed could as well have given the opposite. It assumes no distribution. ValueError for no pairs.
    """
    from scipy import stats

    differences = [second - first for first, second in pairs]
    found = estimate(differences)
    if len(differences) < LEAST_PAIRS or not np.isfinite(differences).all():
        return Difference(found, None)
    test = stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if len(differences) <= EXACT_PAIRS else RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return Difference(found, float(test.pvalue))

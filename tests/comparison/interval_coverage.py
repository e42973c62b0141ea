"""How often the intervals of a comparison hold the true mean: `python tests/comparison/interval_coverage.py`, a minute.

Draws of known mean take the place of seeds. What it prints stands in job.comparison.statistics.COVERAGE.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from job.comparison.statistics import intervals

SIGMA = 0.5
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
DISTRIBUTIONS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda generator, shape: generator.normal(size=shape), 0.0),
    "skewed": (lambda generator, shape: generator.lognormal(sigma=SIGMA, size=shape), float(np.exp(SIGMA**2 / 2))),
}


def coverage(distribution: str, values: int, draws: int) -> float:
    """Share of the intervals of so many values that hold the true mean."""
    draw, truth = DISTRIBUTIONS[distribution]
    low, high = intervals(draw(np.random.default_rng(1), (draws, values)))
    return float(((low <= truth) & (truth <= high)).mean())


def main() -> None:
    """Print the table."""
    for values in (3, 4, 5, 6, 8, 10, 20):
        shares = [f"{coverage(name, values, draws=4000):.2f}" for name in DISTRIBUTIONS]
        print(f"    {values}: ({', '.join(shares)}),", flush=True)


if __name__ == "__main__":
    main()

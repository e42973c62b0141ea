"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """Seconds spent in named phases of the loop, in all and since the last read."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self._interval: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._interval[name] += time.perf_counter() - started  # type: ignore[assignment]  # Counter holds any number

    def read(self) -> Counter[str]:
        """Seconds of each phase since the last read (0 for others)."""
        interval, self._interval = self._interval, Counter()
        self.total.update(interval)
        return interval

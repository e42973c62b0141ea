"""Whether a rank is alive and at work."""

from __future__ import annotations

import time
from collections.abc import Callable

from job.monitoring.metrics import Series

USUAL_STEPS = 20  # without progress for so many of its usual steps a rank counts as stalled


class Vitals:
    """Signs of life of this rank; `silence` gives the seconds since its main loop last came forward."""

    def __init__(self, silence: Callable[[], float], at_least: float, started: float) -> None:
        self._silence, self._at_least, self._started = silence, at_least, started
        self._usual_step: float | None = None
        self._last_step: float | None = None
        self.training = False

    def step_ended(self) -> None:
        self._last_step = time.time()

    def usual_step(self, seconds: float) -> None:
        """Note the mean step time of an interval."""
        self._usual_step = seconds

    @property
    def stall_limit(self) -> float:
        """Seconds without progress that are too many."""
        return max(self._at_least, USUAL_STEPS * (self._usual_step or 0.0))

    def healthy(self) -> tuple[bool, str]:
        """False when the loop has stood still for too long. Until the first step has ended, nobody knows how long is too long."""
        if self._last_step is None:
            return True, "starting"
        silence, limit = self._silence(), self.stall_limit
        return silence < limit, f"{silence:.1f} s since the last progress, stalled from {limit:.1f} s on"

    def ready(self) -> tuple[bool, str]:
        """Whether it trains."""
        return self.training, "training" if self.training else "not training"

    def series(self) -> dict[Series, float]:
        values = {
            "start_timestamp_seconds": self._started,
            "last_progress_timestamp_seconds": time.time() - self._silence(),
            "stall_limit_seconds": self.stall_limit,
        }
        if self._last_step is not None:
            values["last_step_timestamp_seconds"] = self._last_step
        return {(f"cyclevae_{name}", ()): value for name, value in values.items()}

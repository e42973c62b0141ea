"""Whether a rank is alive and at work: what /healthz and /readyz answer, and what the alert of a stalled run reads."""

from __future__ import annotations

import time
from collections.abc import Callable

from job.metric_names import Series

USUAL_STEPS = 20  # without progress for as long as so many of its usual steps take, a rank counts as stalled


class Vitals:
    """Signs of life of this rank; `silence` gives the seconds since its main loop last made progress."""

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
        """Seconds without progress that are too many: relative to the usual step, which differs a thousandfold."""
        return max(self._at_least, USUAL_STEPS * (self._usual_step or 0.0))

    def healthy(self) -> tuple[bool, str]:
        """False when the loop has stood still for too long.

        Before the first step has ended the answer is True: that step may compile the model for minutes, and a restart
        would only begin the compilation anew.
        """
        if self._last_step is None:
            return True, "starting"
        silence, limit = self._silence(), self.stall_limit
        return silence < limit, f"{silence:.1f} s since the last progress, stalled from {limit:.1f} s on"

    def ready(self) -> tuple[bool, str]:
        """Whether it trains."""
        return self.training, "training" if self.training else "not training"

    def series(self) -> dict[Series, float]:
        values: dict[Series, float] = {
            ("cyclevae_start_timestamp_seconds", ()): self._started,
            ("cyclevae_last_progress_timestamp_seconds", ()): time.time() - self._silence(),
            ("cyclevae_stall_limit_seconds", ()): self.stall_limit,
        }
        if self._last_step is not None:
            values["cyclevae_last_step_timestamp_seconds", ()] = self._last_step
        return values

"""How far a run is: a bar on a terminal, else a line per log interval, and one for programs where that is asked for."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from job.metric_names import LOSS_TERMS


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def rate(tokens_per_second: float) -> str:
    """Tokens per second in three digits."""
    if tokens_per_second >= 1000:
        return f"{tokens_per_second / 1000:.3g}k tokens/s"
    return f"{tokens_per_second:.3g} tokens/s"


class Progress:
    """Progress of a run of `total` steps that starts at `step`; silent unless `show` (rank 0).

    With `status_lines` it also prints one JSON object a log interval on stdout. Launchers read that line, never the
    one for people, whose words may change: {"cyclevae": "progress", "step": 480, "steps": 700, "loss": 6.3,
    "tokens_per_second": 1360.0, "seconds_left": 77}. `loss` is null when no step of the interval had a finite one.
    """

    def __init__(self, total: int, step: int, show: bool, status_lines: bool = False) -> None:
        self.total, self.first, self.started = total, step, time.monotonic()
        self.show, self.status_lines = show, status_lines
        self.bar: Any = None
        if show and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def update(self, step: int) -> None:
        """Move the bar to `step` steps done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a log interval that ended with `step` steps done."""
        if not self.show:
            return
        terms = "  ".join(f"{term.short} {values[term.key]:.4g}" for term in LOSS_TERMS if term.key in values)
        speed = rate(values["tokens_per_second"])
        left = self._seconds_left(step)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{terms}  {speed}")
        else:
            self._print(f"step {step}/{self.total}  {terms}  {speed}  {clock(left)} left")
        if self.status_lines:
            self._print(self._status_line(step, values, left))

    def say(self, text: str) -> None:
        """A line that does not break the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.show:
            self._print(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _seconds_left(self, step: int) -> float:
        """At the mean pace since this process began, evaluations and saves included."""
        steps_here = max(1, step - self.first)
        return (time.monotonic() - self.started) / steps_here * (self.total - step)

    def _status_line(self, step: int, values: Mapping[str, float], left: float) -> str:
        loss = values.get("loss", math.nan)
        status = {
            "cyclevae": "progress",
            "step": step,
            "steps": self.total,
            "loss": loss if math.isfinite(loss) else None,  # NaN is not JSON
            "tokens_per_second": values["tokens_per_second"],
            "seconds_left": round(left),
        }
        return json.dumps(status)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # whoever read the output has gone; that must not end a run
            print(text, flush=True)

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
from job.monitoring.trainer_status import TrainerServer, TrainerStatus

COLUMNS = 100  # of a line for people
BAR_COLUMNS = 10  # of which the bar itself
BAR = f"{{n_fmt}}/{{total_fmt}}  {{desc}}{{bar:{BAR_COLUMNS}}}  {{remaining}} left"  # as tqdm formats it


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


def terms(values: Mapping[str, float], digits: int, gap: str = "  ") -> str:
    """The terms of the loss in a row."""
    return gap.join(f"{term.short} {values[term.key]:.{digits}g}" for term in LOSS_TERMS if term.key in values)


def fitted(values: Mapping[str, float], room: int) -> str:
    """The terms of the loss and the speed in at most `room` columns: with fewer digits, then without the speed."""
    speed = rate(values["tokens_per_second"])
    renderings = [
        f"{terms(values, digits=4)}  {speed}",
        f"{terms(values, digits=3)}  {speed}",
        f"{terms(values, digits=3, gap=' ')}  {speed}",
        *(terms(values, digits, gap=" ") for digits in (3, 2, 1)),
    ]
    return next((text for text in renderings if len(text) <= room), renderings[-1])


class Progress:
    """Progress of a run of `total` steps that starts at `step`; silent unless `show` (rank 0).

    With `status_lines` it also prints one JSON object a log interval on stdout. Launchers read that line, never the
    one for people, whose words may change: {"cyclevae": "progress", "step": 480, "steps": 700, "loss": 6.3,
    "tokens_per_second": 1360.0, "seconds_left": 77}. `loss` is null when no step of the interval had a finite one.
    A `trainer`, Kubeflow's, is told the same.
    """

    def __init__(
        self, total: int, step: int, show: bool, status_lines: bool = False, trainer: TrainerServer | None = None
    ) -> None:
        self._trainer = TrainerStatus(trainer) if show and trainer is not None else None
        self.total, self.first, self.started = total, step, time.monotonic()
        self.show, self.status_lines = show, status_lines
        self.bar: Any = None
        if show and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=step, dynamic_ncols=True, smoothing=0.1, bar_format=BAR)

    def update(self, step: int) -> None:
        """Move the bar to `step` steps done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a log interval that ended with `step` steps done."""
        if not self.show:
            return
        left = self._seconds_left(step)
        if self.bar is not None:
            around = len(f"{self.total}/{self.total}  {' ' * BAR_COLUMNS}  100:00:00 left")
            self.bar.set_description_str(f"{fitted(values, COLUMNS - around)}  ")
        else:
            start, end = f"step {step}/{self.total}  ", f"  {clock(left)} left"
            self._print(f"{start}{fitted(values, COLUMNS - len(start) - len(end))}{end}")
        if self.status_lines:
            self._print(self._status_line(step, values, left))
        if self._trainer is not None:
            self._trainer.tell(step, self.total, left, values)

    def first_step(self, step: int, seconds: float) -> None:
        """Tell that the first step of this process is done, long before the first log interval may be.

        A bar shows it by itself. The pace counts from here on: the first step may have compiled for minutes.
        """
        self.first, self.started = step, time.monotonic()
        if self.show and self.bar is None:
            self._print(f"step {step}/{self.total}  first step done in {seconds:.1f} s")

    def say(self, text: str) -> None:
        """A line that does not break the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.show:
            self._print(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self._trainer is not None:
            self._trainer.close()

    def _seconds_left(self, step: int) -> float:
        """At the mean pace since this process began to step, evaluations and saves included."""
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

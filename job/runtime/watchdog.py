"""A thread that ends a process whose main loop has made no progress for too long, saying where and because of whom."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time

from job.errors import ExitCode
from job.runtime import distributed


class Watchdog:
    """Fed by `beat`; without a beat for timeout_seconds: every thread's stack, one line, exit with ExitCode.RETRY."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.step, self.phase, self.last_beat = 0, "start", time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Start watching; the first beat counts from here."""
        self.last_beat = time.monotonic()
        self._thread.start()
        return self

    def __enter__(self) -> Watchdog:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def beat(self, step: int | None = None, phase: str | None = None) -> None:
        """The main loop has come to `phase` of `step` (or makes progress in the one it is in)."""
        self.step, self.phase, self.last_beat = (
            self.step if step is None else step,
            phase or self.phase,
            time.monotonic(),
        )
        distributed.progress(self.step, self.phase)

    @property
    def seconds_since_beat(self) -> float:
        """Seconds since the last sign of progress."""
        return time.monotonic() - self.last_beat

    def stop(self) -> None:
        """Stop watching."""
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(min(1.0, self.timeout_seconds / 10)):
            if self.seconds_since_beat > self.timeout_seconds:
                self._bark()

    def _bark(self) -> None:
        silence = self.seconds_since_beat
        faulthandler.dump_traceback(all_threads=True)
        reason, code = distributed.missing(or_slowest=True)
        if self._end.is_set() or self.seconds_since_beat < silence:  # it went on while we looked
            return
        others = f"; {reason}" if reason else ""
        print(
            f"no progress for {silence:.0f} s in step {self.step}, {self.phase} (training.sick_rank_timeout_seconds={self.timeout_seconds:g}){others}",
            file=sys.stderr,
            flush=True,
        )
        distributed.leave(code if code == ExitCode.FAILED else ExitCode.RETRY)

"""A thread that ends a process whose main loop makes no progress for too long, saying where and because of whom.

A collective that waits for a lost rank, a read from a dead file system and a stuck driver call all look alike: the main
thread is inside C code, where no exception and no signal handler of Python reaches it. Only another thread can act.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time

from job.errors import ExitCode
from job.runtime import distributed
from job.runtime.failures import record_failure

# How long the main loop may take to find by itself that another rank gave up. A collective only fails for the
# neighbours of the rank that left, and then for theirs: of 32 ranks the last one noticed after 70 s.
NOTICE_SECONDS = 5.0


class Watchdog:
    """Watches within a `with` block, fed by `beat`.

    Without a beat for timeout_seconds: every thread's stack, one line on the rank that is to blame, exit with
    ExitCode.RETRY (or the code of the rank that gave up). Where another rank gave up it waits no longer.

    It must not outlive the run it watches: in a sweep the same process goes on with the next run, whose beats go to
    that run's own watchdog.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.step, self.phase, self.last_beat = 0, "start", time.monotonic()
        self._patience = timeout_seconds  # of the phase that the main loop is in
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.last_beat = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=1.0)  # no longer: it may be in the middle of asking for the other ranks

    def beat(self, step: int | None = None, phase: str | None = None, patience: float = 0.0) -> None:
        """The main loop has come to `phase` of `step` (or makes progress in the one it is in).

        Until the next beat it may take `patience` seconds where that is longer than timeout_seconds.
        """
        self._patience = max(self.timeout_seconds, patience)
        if step is not None:
            self.step = step
        if phase is not None:
            self.phase = phase
        self.last_beat = time.monotonic()
        distributed.progress(self.step, self.phase)

    @property
    def seconds_since_beat(self) -> float:
        """Seconds since the main loop last made progress."""
        return time.monotonic() - self.last_beat

    def _run(self) -> None:
        told_at: float | None = None
        interval = min(1.0, self.timeout_seconds / 10)
        looked_at = time.monotonic()
        while not self._end.wait(interval):
            asleep, looked_at = time.monotonic() - looked_at - interval, time.monotonic()
            if asleep > interval:  # the process was stopped as a whole (Ctrl-Z), and this thread with it
                self.last_beat = min(self.last_beat + asleep, looked_at)
            if told_at is None and distributed.another_gave_up():
                told_at = time.monotonic()
            if told_at is not None and time.monotonic() > told_at + NOTICE_SECONDS:
                self._end_with_the_others()
            elif self.seconds_since_beat > self._patience:
                self._end_process()

    def _end_with_the_others(self) -> None:
        """Say which rank gave up, and end."""
        loss = distributed.missing()
        if loss is not None and not self._end.is_set():
            self._leave(f"lost another rank: {loss.reason}", loss)

    def _end_process(self) -> None:
        """Say why and end; return when the main loop went on while the other ranks were asked for."""
        silence = self.seconds_since_beat
        faulthandler.dump_traceback(all_threads=True)
        loss = distributed.missing(or_slowest=True)
        if self._end.is_set() or self.seconds_since_beat < silence:
            return
        limit = f"training.sick_rank_timeout_seconds={self.timeout_seconds:g}"
        if self._patience > self.timeout_seconds:
            limit = f"this phase may take {self._patience:g} s"
        message = f"no progress for {silence:.0f} s in step {self.step}, {self.phase} ({limit})"
        if loss is not None:
            message += f"; {loss.reason}"
        self._leave(message, loss)

    def _leave(self, message: str, loss: distributed.Loss | None) -> None:
        print(message, file=sys.stderr, flush=True)
        code = ExitCode.RETRY if loss is None else loss.exit_code
        record_failure(message, code, consequence=loss is not None and not loss.is_here)
        distributed.leave(code)

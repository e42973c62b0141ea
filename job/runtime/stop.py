"""Stop signals: a signal sets a flag, and the loop acts on it at a step boundary where all ranks have agreed.

Imports nothing heavy, so that `install` can be the first thing a program does.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SECOND_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_STOP_SECONDS = (
    1.0  # Ctrl-C and scancel reach a worker twice: from the terminal or slurmstepd, and once more through torchrun
)
TIME_BUDGET = 1000  # above every signal number


def on_signals(callback: Callable[[int], None]) -> None:
    """Call `callback(number)` from a thread for every stop signal, at once; to be called from the main thread.

    The interpreter runs signal handlers between two instructions of the main thread, which may be stuck in a collective for minutes;
    the byte that it writes into a socket when the signal arrives wakes a thread.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while True:
            for number in reader.recv(64):
                if number in STOP_SIGNALS:
                    callback(number)

    threading.Thread(target=watch, name="stop-signals", daemon=True).start()
    for number in STOP_SIGNALS:
        signal.signal(
            number, lambda *_: writer.fileno()
        )  # a handler of Python, or nothing is written; it also keeps the socket open
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a loader worker's signals are not ours


class StopSignals:
    """Flag set by SIGTERM, SIGINT, SIGUSR1 or SIGUSR2; a second SIGTERM or SIGINT ends the process at once.

    The process that ends at once leaves 128 + signal number; a checkpoint half written by it is never taken for a whole one.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # signal number, time
        self._started = time.monotonic()
        self._done = False

    def install(self) -> StopSignals:
        """Take over the signals; from the main thread, once, before anything slow is imported."""
        on_signals(self._received)
        return self

    @property
    def requested(self) -> str | None:
        """Name of the signal this rank received."""
        return signal.Signals(self._first[0]).name if self._first else None

    @property
    def requested_seconds_ago(self) -> float | None:
        """Seconds since this rank received its first signal."""
        return time.monotonic() - self._first[1] if self._first else None

    def agreed(self, agree_max: Callable[[int], int], max_minutes: float | None = None) -> str | None:
        """Why all ranks stop now: a signal to any of them, or the time budget (counted from the start of the process); else None.

        Every rank calls it at the same step boundary; agree_max is distributed.agree_max.
        """
        code = self._first[0] if self._first else 0
        if max_minutes is not None and time.monotonic() - self._started >= 60 * max_minutes:
            code = code or TIME_BUDGET
        code = agree_max(code)
        if code == TIME_BUDGET:
            return f"training.max_minutes={max_minutes:g}"
        return signal.Signals(code).name if code else None

    def ignore_further(self) -> None:
        """Let no later signal change the exit code: the stop is saved and agreed, only the exit is left."""
        self._done = True

    def _received(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (number, now)
        elif number in SECOND_SIGNALS and not self._done and now - self._first[1] > SAME_STOP_SECONDS:
            os.write(2, f"second signal ({signal.Signals(number).name}): ending at once, without saving\n".encode())
            os._exit(128 + number)


def ignore_in_worker(_worker: int = 0) -> None:
    """For loader workers (worker_init_fn): the trainer decides when they end, also when a signal reaches the whole process group."""
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

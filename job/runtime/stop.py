"""Stop signals: a signal sets a flag, and the loop acts on it at a step boundary where all ranks have agreed.

A rank that stopped by itself would leave the others waiting in a collective; so its wish (`wish`) goes to all of them
in one small all-reduce a step, which travels while the step is computed, and all ranks save the same step. What a rank
receives after it has sent its wish waits for the next step. Imports nothing heavy, so that `install` can be
the first thing a program does: importing torch takes seconds in which a signal would kill the process.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# Those of a person or a scheduler who means it. SIGUSR1 and SIGUSR2 are advance notices, which schedulers repeat.
SECOND_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Ctrl-C and scancel reach a worker twice: from the terminal or slurmstepd, and once more through torchrun.
SAME_STOP_SECONDS = 1.0
TIME_BUDGET = 1000  # above every signal number


def on_signals(callback: Callable[[int], None]) -> None:
    """Call `callback(number)` from a thread for every stop signal, at once; to be called from the main thread.

    A handler of Python would not do: the interpreter runs it between two instructions of the main thread, which may be
    inside a collective or a stuck read for minutes. But at the moment the signal arrives, C code writes its number into
    the wakeup file descriptor. Here that is a socket, on whose other end a thread waits.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while True:
            for number in reader.recv(64):
                if number in STOP_SIGNALS:
                    callback(number)

    def handler(*_: object) -> None:
        """Does nothing, but Python writes to the wakeup descriptor only for signals that have a handler in Python."""
        writer.fileno()  # refers to the socket, which would be closed once nothing did

    threading.Thread(target=watch, name="stop-signals", daemon=True).start()
    for number in STOP_SIGNALS:
        signal.signal(number, handler)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # A forked loader worker inherits the descriptor: a signal to it would otherwise look like one to this process.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class StopSignals:
    """Flag set by SIGTERM, SIGINT, SIGUSR1 or SIGUSR2; a second SIGTERM or SIGINT ends the process at once.

    The second one is for a run that does not come to its next step boundary, or whose save takes too long. It ends with
    128 + signal number and saves nothing; a checkpoint that was being written is never taken for a complete one.
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

    def wish(self, max_minutes: float | None = None) -> int:
        """A number for why this rank would stop now: a signal to it, or the time budget; 0 to go on.

        The budget of max_minutes counts from the start of the process.
        """
        if self._first:
            return self._first[0]
        in_time = max_minutes is None or time.monotonic() - self._started < 60 * max_minutes
        return 0 if in_time else TIME_BUDGET

    @staticmethod
    def reason(wish: int, max_minutes: float | None = None) -> str | None:
        """The largest wish of all ranks in words; None to go on."""
        if wish == TIME_BUDGET:
            return f"training.max_minutes={max_minutes:g}"
        return signal.Signals(wish).name if wish else None

    def ignore_further(self) -> None:
        """Let no later signal change the exit code: the stop is saved and agreed, only the exit is left."""
        self._done = True

    def ignore_to_the_end(self) -> None:
        """Let no signal end a process that is only leaving: Python's exit gives signals their default back."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _received(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (number, now)
        elif number in SECOND_SIGNALS and not self._done and now - self._first[1] > SAME_STOP_SECONDS:
            # os.write and os._exit: the main thread may hold the locks of sys.stderr and of the interpreter's exit.
            os.write(2, f"second signal ({signal.Signals(number).name}): ending at once, without saving\n".encode())
            os._exit(128 + number)


def ignore_in_worker(_worker: int = 0) -> None:
    """For loader workers (worker_init_fn): the trainer decides when they end.

    Ctrl-C and scancel reach the whole process group. A worker that ended of it would fail the step that is to be
    finished before the save.
    """
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

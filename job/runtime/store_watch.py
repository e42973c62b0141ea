"""While a rank waits for the others to join, somebody looks whether they can still come.

A rank that is started again within seconds may come to the store of the attempt that is just ending, read there where
the old ranks listened, and wait for one of them: gloo does so for as long as a collective may take, an hour where the
ranks agree about a save. The store ends meanwhile, and the new ranks meet elsewhere, or at the same address; only a
connection from before tells. A host that lost its power or its network closes no connection: it no longer answers, for
which no timeout of PyTorch's ends a question. Or the store stays, and it is another rank that ended: if it had joined,
its signs of life tell, and otherwise only time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from job.errors import ExitCode
from job.runtime.failures import record_failure
from job.runtime.heartbeat import Sign

LOOK_SECONDS = 2.0
# A store has a thread of its own, which answers within milliseconds whatever its process does. Signs of life have one
# too, but a rank that loads libraries from a busy file system may give none for many seconds.
SILENT_SECONDS = 60.0
GONE = "the ranks' meeting place has ended while this rank waited there for the others"
SILENT = "the ranks' meeting place has not answered for {:g} s, in which this rank waited there for the others"
LOST = "{} had joined the run and has given no sign of life for {:g} s, in which this rank waited for the others"
ALONE = "the other ranks have not joined the run within {:g} s"


@contextmanager
def ended_with(signs: Callable[[], dict[int, Sign]], within: float) -> Iterator[None]:
    """End this process, to be started again, when the context outlives the store's host or `within` seconds.

    `signs` asks the store for ranks' signs of life, by rank, and is called from a thread: when one of these ranks had
    joined and gives no more of them, this process ends as well.
    """
    watch = _Watch(signs, within)
    for task in (watch.ask, watch.look):
        threading.Thread(target=task, name=f"store watch: {task.__name__}", daemon=True).start()
    try:
        yield
    finally:
        watch.over.set()


@dataclass
class _Watch:
    """Two threads, as one of them may wait for an answer for ever."""

    signs: Callable[[], dict[int, Sign]]
    within: float
    over: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)
    # Looks, not seconds: a process that is stopped as a whole (Ctrl-Z) does not look meanwhile.
    looks: int = 0  # since the last answer
    closed: bool = False
    counts: dict[int, int] = field(default_factory=dict)  # of signs, by rank
    stands: dict[int, int] = field(default_factory=dict)  # answers since a rank's count last changed
    lost: Sign | None = None

    def ask(self) -> None:
        """Note what the store answers, or that the connection was closed."""
        while not self.over.wait(LOOK_SECONDS):
            try:
                signs = self.signs()
            except RuntimeError:
                self.closed = True
                return
            self.looks = 0
            for rank, sign in signs.items():
                self.note(rank, sign)

    def note(self, rank: int, sign: Sign) -> None:
        """Note a rank that had joined and no longer renews its sign."""
        stands_still = self.counts.get(rank) == sign.count
        self.counts[rank] = sign.count
        self.stands[rank] = self.stands[rank] + 1 if stands_still else 0
        if sign.count >= 0 and self.stands[rank] * LOOK_SECONDS > SILENT_SECONDS:
            self.lost = sign

    def look(self) -> None:
        """End the process when the others cannot come."""
        while not self.over.wait(LOOK_SECONDS):
            self.looks += 1
            found = self.trouble()
            if found and not self.over.is_set():
                os.write(2, f"error: {found}\n".encode())
                record_failure(found, ExitCode.RETRY, consequence=True)
                os._exit(ExitCode.RETRY)

    def trouble(self) -> str | None:
        """Why the others cannot come; None while they may."""
        if self.closed:
            return GONE
        if self.looks * LOOK_SECONDS > SILENT_SECONDS:
            return SILENT.format(SILENT_SECONDS)
        if self.lost is not None:
            return LOST.format(self.lost, SILENT_SECONDS)
        return ALONE.format(self.within) if time.monotonic() - self.began > self.within else None

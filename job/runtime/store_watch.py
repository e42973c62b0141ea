"""While a rank waits for the others to join, somebody looks whether they can still come.

A rank that is started again within seconds may come to the store of the attempt that is just ending, read there where
the old ranks listened, and wait for one of them: gloo does so for as long as a collective may take, an hour where the
ranks agree about a save. The store ends meanwhile, and the new ranks meet elsewhere, or at the same address; only a
connection from before tells. A host that lost its power or its network closes no connection: it no longer answers, for
which no timeout of PyTorch's ends a question. Or the store stays, and it is the other rank that ended: then only time
tells.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist

from job.errors import ExitCode
from job.runtime.failures import record_failure

LOOK_SECONDS = 2.0
SILENT_SECONDS = 60.0  # a store has a thread of its own, which answers within milliseconds whatever its process does
GONE = "the ranks' meeting place has ended while this rank waited there for the others"
SILENT = "the ranks' meeting place has not answered for {:g} s, in which this rank waited there for the others"
ALONE = "the other ranks have not joined the run within {:g} s"


@contextmanager
def ended_with(store: dist.Store, within: float) -> Iterator[None]:
    """End this process, to be started again, when the context outlives the store's host or `within` seconds."""
    own: dist.Store = store.clone()  # type: ignore[attr-defined]  # missing in the stubs; the given one is busy
    watch = _Watch(own, within)
    for task in (watch.ask, watch.look):
        threading.Thread(target=task, name=f"store watch: {task.__name__}", daemon=True).start()
    try:
        yield
    finally:
        watch.over.set()


@dataclass
class _Watch:
    """Two threads, as one of them may wait for an answer for ever."""

    store: dist.Store
    within: float
    over: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)
    looks: int = 0  # since the last answer; a process that is stopped as a whole (Ctrl-Z) does not look meanwhile
    closed: bool = False

    def ask(self) -> None:
        """Note that the store answered, or that the connection was closed."""
        while not self.over.wait(LOOK_SECONDS):
            try:
                self.store.check(["there"])
            except RuntimeError:
                self.closed = True
                return
            self.looks = 0

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
        return ALONE.format(self.within) if time.monotonic() - self.began > self.within else None

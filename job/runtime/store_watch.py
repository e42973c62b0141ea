"""While a rank waits for the others to join, somebody looks whether they can still come.

A rank that is started again within seconds may come to the store of the attempt that is just ending, read there where
the old ranks listened, and wait for one of them: gloo does so for as long as a collective may take, an hour where the
ranks agree about a save. The store ends meanwhile, and the new ranks meet elsewhere, or at the same address; only a
connection from before tells. Or the store stays, and it is the other rank that ended: then only time tells.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from job.errors import ExitCode
from job.runtime.failures import record_failure

LOOK_SECONDS = 2.0
GONE = "the ranks' meeting place has ended while this rank waited there for the others"
ALONE = "the other ranks have not joined the run within {:g} s"


@contextmanager
def ended_with(store: dist.Store, within: float) -> Iterator[None]:
    """End this process, to be started again, when the context outlives the store's host or `within` seconds."""
    over = threading.Event()
    own: dist.Store = store.clone()  # type: ignore[attr-defined]  # missing in the stubs; the given one is busy
    looking = threading.Thread(target=_look, args=(own, over, within), name="store watch", daemon=True)
    looking.start()
    try:
        yield
    finally:
        over.set()


def _look(store: dist.Store, over: threading.Event, within: float) -> None:
    latest = time.monotonic() + within
    while not over.wait(LOOK_SECONDS):
        try:
            store.check(["there"])
            found = ALONE.format(within) if time.monotonic() > latest else None
        except RuntimeError:  # a connection that was closed
            found = GONE
        if found is not None and not over.is_set():
            os.write(2, f"error: {found}\n".encode())
            record_failure(found, ExitCode.RETRY, consequence=True)
            os._exit(ExitCode.RETRY)

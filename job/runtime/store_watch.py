"""While a rank waits for the others to join, somebody looks whether the place where they meet is still there.

A rank that is started again within seconds may come to the store of the attempt that is just ending, read there where
the old ranks listened, and wait for one of them: gloo does so for as long as a collective may take, five minutes. The
store ends meanwhile, and the new ranks meet elsewhere, or at the same address; only a connection from before tells.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from job.errors import ExitCode
from job.runtime.failures import record_failure

LOOK_SECONDS = 2.0
GONE = "the ranks' meeting place has ended while this rank waited there for the others"


@contextmanager
def ended_with(store: dist.Store) -> Iterator[None]:
    """End this process, to be started again, when the store's host ends within the context."""
    over = threading.Event()
    own: dist.Store = store.clone()  # type: ignore[attr-defined]  # missing in the stubs; the given one is busy
    looking = threading.Thread(target=_look, args=(own, over), name="store watch", daemon=True)
    looking.start()
    try:
        yield
    finally:
        over.set()


def _look(store: dist.Store, over: threading.Event) -> None:
    while not over.wait(LOOK_SECONDS):
        try:
            store.check(["there"])
        except RuntimeError:  # a connection that was closed
            if not over.is_set():
                os.write(2, f"error: {GONE}\n".encode())
                record_failure(GONE, ExitCode.RETRY, consequence=True)
                os._exit(ExitCode.RETRY)

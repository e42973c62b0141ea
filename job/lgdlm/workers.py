"""Work that several processes share, its results in the order in which it was given."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from job.errors import RetryError

AHEAD = 4  # pieces of work for each process that are begun before the first result of them is taken

Work = TypeVar("Work")
Result = TypeVar("Result")


def in_order(function: Callable[[Work], Result], pieces: Iterable[Work], processes: int) -> Iterator[Result]:
    """The function's result of every piece. With one process the work is done in this one.

    RetryError when the system kills a process.
    """
    if processes == 1:
        yield from map(function, pieces)
        return
    pieces = iter(pieces)
    # Not forked: a thread of this process may hold a lock, which nobody would release in the copy.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin)
    begun: deque[Future[Result]] = deque()
    try:
        begun.extend(pool.submit(function, piece) for piece in islice(pieces, AHEAD * processes))
        while begun:
            result = begun.popleft().result()
            begun.extend(pool.submit(function, piece) for piece in islice(pieces, 1))
            yield result
    except BrokenProcessPool as error:
        raise RetryError(
            "a worker process was killed, perhaps for want of memory; give the same command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Ctrl-C is for the first process, and a worker ends with it, also where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)

"""The copy of a store's data (data.dir=s3://...) that a run makes on its nodes before it opens it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from job.config import Config
from job.data.cached import local_copy
from job.errors import StoppedError
from job.files import is_url
from job.runtime import distributed

POLL_SECONDS = 0.2


def fetch_data(config: Config, beat: Callable[[], object], stop_is_requested: Callable[[], bool]) -> None:
    """Copy the data to this node if its directory is a URL. All ranks call it, and leave it when all nodes have theirs.

    A copy may take an hour, in which a rank that waits in a collective, or whose watchdog hears nothing, would be taken
    for lost. So another thread copies, while this one agrees with the other ranks again and again that some are not
    done. Raises what the copy raises, and StoppedError on all ranks when one was told to stop.
    """
    url = config.data.dir or ""
    if config.data.source != "shards" or not is_url(url):
        return
    stopped = threading.Event()
    failures: list[Exception] = []

    def copy() -> None:
        try:
            local_copy(url, Path(config.data.cache_dir or ""), stopped.is_set)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=copy, name="copy", daemon=True)
    thread.start()
    going_on, stopping = 1, 0
    while going_on:
        agreement = distributed.agree_meanwhile(lambda: [int(thread.is_alive()), int(stop_is_requested())])
        going_on, stopping = agreement()
        beat()
        if stopping:
            stopped.set()
        if going_on:
            time.sleep(POLL_SECONDS)
    if failures:
        raise failures[0]
    if stopping:
        raise StoppedError(f"stopped while {url} was copied; the same command goes on")

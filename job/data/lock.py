"""One preparation at a time in a directory.

The lock is the kernel's, on DIR/.lock: it goes with the process that holds it, however that ends. The first of the
processes that share a preparation takes it for all of them; the file says which run's it is, so that the others can
tell their own run from one that is at work there already.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from job.data.console import say
from job.errors import UserError

LOCK_FILE = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def held(directory: Path, run: str) -> Iterator[None]:
    """Hold the directory, which is made if need be, for a run. UserError at once if another process holds it."""
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_FILE
    with _locked(path) as file:
        file.truncate(0)
        file.write(json.dumps({"run": run, "process": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new and not any(directory.iterdir()):  # nothing came of it
                directory.rmdir()


def is_held_for(directory: Path, run: str) -> bool:
    """Whether the first process of this run has taken the directory, or had it when it was killed."""
    return bool(_holder(directory / LOCK_FILE).get("run") == run)


def _locked(path: Path) -> TextIO:
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                file.close()
                holder = _holder(path)
                who = f" (process {holder['process']} on {holder['host']})" if holder else ""
                raise UserError(
                    f"{path.parent}: another preparation is at work here{who}; let it finish, or give another --out"
                ) from error
            say(f"{path.parent} cannot be locked ({error.strerror}); do not start a second preparation here")
        # Between opening and locking, the holder may have finished and removed the file: this would be a lock on a
        # file that nobody else will ever open.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _holder(path: Path) -> dict[str, Any]:
    """What the lock file says; nothing while it is being written."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}

"""Why a process ended, as a line of JSON for the launcher that started it. It needs no torch."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from dataclasses import asdict

from job.errors import JobError
from job.failure_records import Failure
from job.runtime.launcher_variables import failures_file, placement


def record_failure(message: str, exit_code: int, consequence: bool) -> None:
    """Append why this process ends to the launcher's file of failures; nothing without CYCLEVAE_FAILURES.

    `consequence`: the cause is on another rank, which writes a line of its own if it still can.
    """
    path = failures_file(os.environ)
    if path is None:
        return
    try:
        rank = placement(os.environ, alone=True).rank
    except (JobError, ValueError):  # the variables themselves may be what is wrong
        rank = 0
    failure = Failure(time.time(), rank, socket.gethostname(), message, int(exit_code), consequence)
    # All ranks append to one file. A single write in append mode is not interleaved with another's on a local disk; on
    # NFS two at the same moment may overwrite each other. The cause comes seconds before its consequences (they look
    # for the lost rank first), so it is not the line that gets lost, and readers skip what is not a whole line.
    line = (json.dumps(asdict(failure), ensure_ascii=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, line)
        finally:
            os.close(file)
    except OSError as error:
        print(f"warning: the failure could not be noted in {path}: {error}", file=sys.stderr, flush=True)

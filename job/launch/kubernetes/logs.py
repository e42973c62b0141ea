"""What the pods of a job print, as it comes, through restarts and through pods that are made anew."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from job.errors import JobError
from job.launch.kubernetes.cluster import Cluster, Unreachable
from job.launch.kubernetes.kinds import OVER, pod_index, state
from job.launch.kubernetes.names import Object
from job.launch.kubernetes.status_lines import for_people, parse

POLL_SECONDS = 2.0


def show(cluster: Cluster, job: Object, lines: int) -> None:
    """Print the last lines of every pod."""
    pods = cluster.pods(job)
    for pod in pods:
        # Twice as many: up to every other line is for programs.
        log = for_people(cluster.log(pod.metadata.name, 2 * lines))
        for line in log[-lines:]:
            print(f"{prefix(pod, len(pods))}{line}")


def follow(cluster: Cluster, job: Object, lines: int) -> None:
    """Print the last lines of every pod and all that follow, until the job is over."""
    readers: dict[str, threading.Thread] = {}
    while True:
        try:
            over = state(cluster.get(job["metadata"]["name"])) in OVER  # asked before the pods: none comes after it
            pods = cluster.pods(job)
        except Unreachable:
            time.sleep(POLL_SECONDS)
            continue
        for pod in pods:
            if pod.metadata.uid not in readers:
                reader = threading.Thread(target=read, args=(cluster, pod, prefix(pod, len(pods)), lines), daemon=True)
                readers[pod.metadata.uid] = reader
                reader.start()
        if over and not any(reader.is_alive() for reader in readers.values()):
            return
        time.sleep(POLL_SECONDS)


def read(cluster: Cluster, pod: Any, start: str, lines: int) -> None:
    """Print what a pod prints until it has ended. A connection that breaks is taken up again after the last line."""
    last = ""
    while True:
        try:
            for line in cluster.log_stream(pod.metadata.name, lines if not last else None):
                stamp, _, text = line.partition(" ")
                if stamp <= last:
                    continue
                last = stamp
                if parse(text) is None:
                    print(f"{start}{text}", flush=True)
            if cluster.phase(pod) in ("Succeeded", "Failed", "Gone"):
                return
        except Unreachable:
            pass
        except BrokenPipeError:  # the reader has gone, `| head` say; only this ends the other threads too
            os._exit(128 + signal.SIGPIPE)
        except JobError as error:
            print(f"{start}error: {error}", file=sys.stderr, flush=True)
            return
        time.sleep(POLL_SECONDS)


def prefix(pod: Any, pods: int) -> str:
    """Which pod a line is from, where there are several."""
    return f"{pod_index(pod)}: " if pods > 1 else ""

"""The file that tells Prometheus' file discovery where the ranks of a job listen.

One directory serves all runs: Prometheus takes a `*` in the name of such a file, but not in the directories above it.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from job.files import write_json

REFRESH_SECONDS = 60.0
STALE_SECONDS = 15 * 60.0  # a job that lives has renewed its file many times


@dataclass(frozen=True)
class RankAddress:
    """Where a rank listens."""

    host: str
    port: int
    node: str


class Targets:
    """The file of one job, for as long as the job lives.

    A killed job cannot remove its file, and Prometheus would go on to miss a rank that nobody will start again. So
    every job cleans when it starts: files of the same run, which has one job at a time, and files of any run that
    were not renewed for a while.
    """

    def __init__(self, directory: Path, run: str, job_id: str, ranks: list[RankAddress]) -> None:
        """`ranks` are in order. OSError when the directory cannot be written."""
        self._groups = [
            {
                "targets": [f"{_in_url(address.host)}:{address.port}"],
                "labels": {"run": run, "job_id": job_id, "rank": str(rank), "node": address.node},
            }
            for rank, address in enumerate(ranks)
        ]
        prefix = f"cyclevae-{re.sub(r'[^A-Za-z0-9_.-]+', '_', run)}@"
        remove_leftovers(directory, prefix)
        self.path = directory / f"{prefix}{job_id}.json"
        self._written = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Renew the file every minute, so that no other job takes it for a leftover."""
        if not self._written or time.monotonic() - self._written >= REFRESH_SECONDS:
            write_json(self.path, self._groups, indent=1)
            self._written = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _in_url(host: str) -> str:
    """A host as it stands before a port: addresses of IPv6 hold colons themselves."""
    return f"[{host}]" if ":" in host else host


def remove_leftovers(directory: Path, own: str) -> None:
    """Remove what killed jobs left: files whose name begins with `own`, and files not renewed for STALE_SECONDS."""
    for path in directory.glob("cyclevae-*.json"):
        try:
            if path.name.startswith(own) or time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:  # another job cleans too
            continue

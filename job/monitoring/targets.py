"""The file that tells Prometheus' file discovery where the ranks of a job listen.

One directory serves all runs: Prometheus takes a `*` in a file's name, but not in the directories above it.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from job.files import write_json

REFRESH_SECONDS = 60.0
STALE_SECONDS = 15 * 60.0  # a live job has renewed its file many times


class Targets:
    """The file of one job, for as long as the job lives."""

    def __init__(self, directory: Path, run: str, job_id: str, endpoints: list[tuple[str, int, str]]) -> None:
        """`endpoints` are (address, port, node) by rank. OSError when the directory cannot be written."""
        self._groups = [
            {
                "targets": [f"[{address}]:{port}" if ":" in address else f"{address}:{port}"],
                "labels": {"run": run, "job_id": job_id, "rank": str(rank), "node": node},
            }
            for rank, (address, port, node) in enumerate(endpoints)
        ]
        prefix = f"cyclevae-{re.sub(r'[^A-Za-z0-9_.-]+', '_', run)}@"
        remove_leftovers(directory, prefix)
        self.path = directory / f"{prefix}{job_id}.json"
        self._written = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Renew the file every minute, so that it is not taken for a leftover."""
        if not self._written or time.monotonic() - self._written >= REFRESH_SECONDS:
            write_json(self.path, self._groups, indent=1)
            self._written = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def remove_leftovers(directory: Path, own: str) -> None:
    """Remove what killed jobs left: files that begin with `own` (a run has one job at a time), and files not renewed for STALE_SECONDS."""
    for path in directory.glob("cyclevae-*.json"):
        try:
            if path.name.startswith(own) or time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:  # another job cleans too
            continue

"""Why a run failed: the records that its ranks leave, and, where there is none, the end of its log.

With the variable CYCLEVAE_FAILURES a launcher names a file to the ranks. Each that fails appends a JSON line with the
fields of `Failure` (job.command, which every command goes through, writes it). When one rank fails, the others lose it
and fail as well; those are marked as consequences, and a launcher shows the first failure that is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.files import json_lines

FAILURES_VARIABLE = "CYCLEVAE_FAILURES"
LOG_LINES = 6  # of a log that are shown where no failure was recorded


@dataclass(frozen=True)
class Failure:
    """The failure of one process of a run."""

    time: float  # seconds since 1970
    rank: int
    node: str
    message: str
    exit_code: int
    consequence: bool  # of another rank's failure

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Failure | None:
        """The failure that a record tells of; None for a record of something else. Further fields are ignored."""
        try:
            return cls(**{name: record[name] for name in cls.__dataclass_fields__})
        except KeyError:
            return None

    def __str__(self) -> str:
        first_line = next(iter(self.message.splitlines()), "no message")
        return f"rank {self.rank} ({self.node}): {first_line}"


def read_failures(path: Path) -> list[Failure]:
    """The failures recorded in a file; none without the file."""
    failures = (Failure.of_record(record) for record in json_lines(path))
    return [failure for failure in failures if failure is not None]


def first_cause(failures: Iterable[Failure]) -> Failure | None:
    """The earliest failure that is no consequence of another; the earliest consequence when there are only such."""
    return min(failures, key=lambda failure: (failure.consequence, failure.time), default=None)


def end_of_log(text: str) -> str | None:
    """The last lines of a log, for a run of which no failure was recorded; None for an empty log.

    That happens when the failing process was not ours (srun, slurmstepd), did not come as far as our code (an
    interpreter that cannot start), or was killed. The lines are shown as they are: nothing here depends on their words.
    """
    lines = [line for line in text.splitlines() if line.strip()][-LOG_LINES:]
    if not lines:
        return None
    return "\n      ".join(["no failure was recorded; the last lines of the log:", *lines])

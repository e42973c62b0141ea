"""What ranks leave for the launcher that started them when they fail: one JSON line each. It needs no torch.

With the variable CYCLEVAE_FAILURES a launcher names a file to the ranks. Each that fails appends a line with the fields
of `Failure` (job.runtime.failures writes it). When one rank fails, the others lose it and fail as well; those lines are
marked as consequences, and a launcher shows the first failure that is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.files import json_lines

VARIABLE = "CYCLEVAE_FAILURES"


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

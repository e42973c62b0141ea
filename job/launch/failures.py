"""Why a run failed: what its ranks recorded, and, where there is no record, the end of its log."""

from __future__ import annotations

from collections.abc import Iterable

from job.failure_records import Failure

LOG_LINES = 6  # of a log that are shown where no failure was recorded


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

"""Failures that end the program with one line, and the exit code that tells a launcher whether to try again."""

from __future__ import annotations

import enum
from collections.abc import Mapping


class ExitCode(enum.IntEnum):
    """Exit codes of every command; launchers decide on a retry by them (docs/explanation/how-a-run-survives.md).

    Kubernetes' restartPolicy ExitCode retries codes of 128 and more, so only failures worth a retry have such codes.
    """

    FINISHED = 0
    FAILED = 1
    USAGE = 2
    RETRY = 134
    STOPPED = 143


EXIT_CODE_MEANINGS: Mapping[ExitCode, str] = {
    ExitCode.FINISHED: "finished; also when a finished run is started again",
    ExitCode.FAILED: "a retry would fail again: bad configuration, bad data, non-finite loss, "
    "no room for the last checkpoint",
    ExitCode.USAGE: "bad command line",
    ExitCode.RETRY: "worth a retry: lost rank, hung collective, dead loader process",
    ExitCode.STOPPED: "stopped by a signal or a time budget; the checkpoint is saved",
}


def first_line(error: BaseException) -> str:
    """Of what an error says, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class JobError(Exception):
    """A failure whose cause is known: it ends the program with one line, without a traceback.

    The message names the file, key, value or rank, and says what to do.
    """

    exit_code: ExitCode = ExitCode.FAILED


class UserError(JobError):
    """A mistake that the user can correct: in the configuration, the data or the files named."""


class UsageError(UserError):
    """A command line that cannot be meant."""

    exit_code = ExitCode.USAGE


class StoppedError(JobError):
    """Stopped by a signal before there was anything to save: the same command begins again."""

    exit_code = ExitCode.STOPPED


class RetryError(JobError):
    """A failure outside the program's power, such as a lost rank, that another attempt may not meet."""

    exit_code = ExitCode.RETRY


class LostRankError(RetryError):
    """Another rank died, hung or gave up: this failure is a consequence, its cause is on that rank.

    All ranks end with the same code: when the other one gave up with FAILED, `exit_code` is FAILED here too, or a
    scheduler would retry bad data for ever.
    """

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.RETRY) -> None:
        super().__init__(message)
        self.exit_code = exit_code

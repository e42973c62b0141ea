"""What went wrong, in one line for the person who can mend it, and the exit code that tells a launcher whether to try again."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of every command; launchers decide on a retry by them (README, "Exit codes")."""

    FINISHED = 0
    FAILED = 1  # a retry will not mend it: bad configuration, bad data, non-finite loss
    USAGE = 2  # bad command line
    RETRY = (
        134  # worth a retry: lost peer, hung collective (128 and more is retried by Kubernetes' restartPolicy ExitCode)
    )
    STOPPED = 143  # stopped by a signal or a time budget, checkpoint saved, resumable


class UserError(Exception):
    """A mistake the user can mend: printed as one line without a traceback.

    The message names the file, key or value and says what to do.
    """

    exit_code: ExitCode = ExitCode.FAILED


class UsageError(UserError):
    """A command line that cannot be meant."""

    exit_code = ExitCode.USAGE


class RetryError(UserError):
    """A failure outside the job's power that another attempt may not meet."""

    exit_code = ExitCode.RETRY

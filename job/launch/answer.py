"""One line and an exit code for a user's mistake, as job.command.guarded gives, without importing torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from job.command import explain
from job.errors import ExitCode, UserError


def answered(command: Callable[[], object]) -> int:
    """Run a command; returns its exit code, after one line on standard error for a mistake of the user."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let Hydra raise instead of printing and exiting
    try:
        return int(command() or ExitCode.FINISHED)  # type: ignore[call-overload]
    except UserError as error:
        message, code = str(error), error.exit_code
    except (HydraException, OmegaConfBaseException) as error:
        message, code = explain(error), ExitCode.USAGE
    print(f"error: {message}", file=sys.stderr)
    return code

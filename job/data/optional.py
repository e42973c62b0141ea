"""Libraries that only some users need."""

from __future__ import annotations

import importlib
import shlex
from typing import Any

from job.errors import UserError


def import_optional(module: str, package: str) -> Any:
    """Import a module of `package`; UserError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        command = f"pip install {shlex.quote(package)}"  # a shell would read the brackets of `ray[data]`
        raise UserError(f"the Python package {package} is not installed: {command}") from error

"""Ctrl-C while a program still loads its modules: it ends without a traceback, as it does later (job.command)."""

from __future__ import annotations

import os
import sys
from types import TracebackType

# What stands in the program's place of the command line when this package is imported: `-m` while Python still looks
# for the module that it is to run, or the path of the command.
PROGRAMS = ("-m", "cyclevae")


def end_quietly_when_interrupted() -> None:
    """Print no traceback of a KeyboardInterrupt that nothing catches, if this process is a program of this package.

    It ends by the signal then, which shells show as 130. Whoever imports the package as a library keeps Python's way.
    """
    if sys.argv and os.path.basename(sys.argv[0]) in PROGRAMS:
        sys.excepthook = _without_interrupts


def _without_interrupts(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, at)

"""Standard output and error that do not end a program: what a full disk, a closed pipe or an encoding refuses is lost.

Imports nothing heavy, so that `open_standard_descriptors` can be the first thing a program does.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def open_standard_descriptors() -> None:
    """Open those of the file descriptors 0, 1 and 2 that a caller closed (`>&-`), on the null device.

    The next file that is opened gets the lowest free number. Were that 1 or 2, whatever a library in C prints would
    go into it: into a socket, or into the middle of a checkpoint.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return


class ToleratedStream:
    """A text stream whose write errors are noted in `failure` and not raised.

    Of a reader that has gone (`... | head`) BrokenPipeError is raised where `end_with_reader` says so: a command that
    prints for ever has to end then. Characters that the stream's encoding lacks are written as escapes, also in the
    locale C, where Python lets through the bytes of file names alone ("surrogateescape").
    """

    def __init__(self, stream: TextIO | None, end_with_reader: bool = False) -> None:
        self.failure: OSError | ValueError | None = None
        self.missing = stream is None  # the caller closed it
        self._end_with_reader = end_with_reader
        self._stream: Any = stream
        if stream is None:  # Python makes none for a descriptor that was closed when it started
            self._stream = open(os.devnull, "w")  # noqa: SIM115  # as long as the process
        elif getattr(stream, "errors", "") in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._noting_failures():
            if self.missing:
                raise ValueError("it is closed")
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._noting_failures():
            self._stream.flush()

    @contextmanager
    def _noting_failures(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            self.failure = error
            if self._end_with_reader:
                raise
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.failure = error

    def flush_to_the_end(self) -> None:
        """Flush, when all is written: a reader that has gone is noted like any other failure."""
        self._end_with_reader = False
        self.flush()

    @property
    def problem(self) -> str | None:
        """Why what was written is lost; None where it is not, and where the reader has gone, which wanted no more."""
        if self.failure is None or isinstance(self.failure, BrokenPipeError):
            return None
        return f"standard output: {getattr(self.failure, 'strerror', None) or self.failure}"

    def abandon_unwritten(self) -> None:
        """At the end: flush, and where that fails leave nothing for the interpreter to flush once more.

        It would print a message of its own about that and change the exit code to 120.
        """
        self.flush_to_the_end()
        if self.failure is not None:
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerated_output(end_with_reader: bool) -> Iterator[ToleratedStream]:
    """Have sys.stdout and sys.stderr be tolerated streams; gives that of sys.stdout."""
    before = sys.stdout, sys.stderr
    output, errors = ToleratedStream(sys.stdout, end_with_reader), ToleratedStream(sys.stderr)
    sys.stdout, sys.stderr = output, errors
    try:
        yield output
    finally:
        output.abandon_unwritten()
        errors.abandon_unwritten()
        sys.stdout, sys.stderr = before

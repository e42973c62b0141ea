"""What a long preparation of data tells on standard error; standard output is for the result alone."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

REPORT_SECONDS = 10.0


def say(message: str) -> None:
    """A line about the course of the work, above a bar that is being drawn."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


class CountedWork:
    """Counts how far a long piece of work is: a bar on a terminal, elsewhere (a log) a line every few seconds."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self._last_report = time.monotonic()
        self._bar = tqdm(desc=what, total=total, unit="", disable=not sys.stderr.isatty(), leave=False)

    def __enter__(self) -> CountedWork:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def add(self, count: int) -> None:
        """Count so many more."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._last_report > REPORT_SECONDS:
            self._last_report = now
            say(f"{self.what}: {self.done}" + (f" of {self.total}" if self.total else ""))

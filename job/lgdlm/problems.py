"""Files that cannot be used: the first ones named on standard error, all of them listed in a file beside the dataset.

OUT.bad.jsonl    an object a line: "file" and "problem"
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import TextIO

from job.data.console import say

NAMED = 20
SUFFIX = ".bad.jsonl"


class Problems:
    """Counts bad files, and writes their list while they are found: it may be as long as the dataset.

    Used as a `with` block; an error within it leaves no list.
    """

    def __init__(self, out: Path) -> None:
        self.count = 0
        self.path = out.with_name(out.name + SUFFIX)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file: TextIO | None = None

    def __enter__(self) -> Problems:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def add(self, path: Path, problem: str) -> None:
        """Note a file."""
        self.count += 1
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._partial.open("w")
            self._file.write(json.dumps({"file": str(path), "problem": problem}) + "\n")
        except OSError as error:  # the error of a full disk names no file
            error.filename = str(self._partial)
            raise
        if self.count <= NAMED:
            say(f"{path}: {problem}")
        elif self.count == NAMED + 1:
            say(f"... and more, which {self.path} will list")

    def publish(self) -> None:
        """All files were looked at: let the list appear. Where there is none, that of an earlier call goes."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._partial.rename(self.path)

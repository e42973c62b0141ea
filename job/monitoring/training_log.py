"""training_log.jsonl, evaluation.jsonl and samples.jsonl: one object a line, in order of steps, no step twice."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.files import json_lines, write_text


class JsonLines:
    """An append-only file of objects that carry a `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[str] = []

    def continue_from(self, step: int) -> None:
        """Drop what a killed run wrote after `step`, where this run goes on from a checkpoint, and half a last line.

        This run does the steps after `step` again and logs them again. Had the old lines stayed, these steps would be
        in the file twice, and whoever draws it would see the curve jump back.
        """
        if self.path.exists():
            kept = [json.dumps(line) + "\n" for line in json_lines(self.path) if line["step"] <= step]
            write_text(self.path, "".join(kept))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append an object. What a full disk refuses is kept and written with a later one: a log must not end a run."""
        self._unwritten.append(json.dumps(values) + "\n")
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.writelines(self._unwritten)
            self._unwritten.clear()
        except OSError as error:
            print(f"warning: {self.path} cannot be written ({error}); kept in memory for now", file=sys.stderr)
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # a part of a line may be in the file; all of it is written again later

"""What a sweep ends with: its runs compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from job.comparison.compared import compare
from job.comparison.runs import Run, read_run
from job.comparison.text import as_text
from job.errors import JobError


def show_sweep(directories: Sequence[Path]) -> None:
    """Print the comparison of a sweep's runs; nothing for a single one.

    It never fails: the sweep is over by then, and its exit code says how its runs went.
    """
    if len(directories) < 2:
        return
    runs: list[Run] = []
    for directory in directories:
        try:
            runs.append(read_run(directory))
        except JobError as error:
            print(f"left out: {error}")
    if len(runs) < 2:
        return
    common = os.path.commonpath([directory.absolute() for directory in directories])
    try:
        print(f"\n{as_text(compare(runs))}\n\nwith plots: cyclevae compare {common} --html compare.html", flush=True)
    except JobError as error:
        print(f"no comparison: {error}")

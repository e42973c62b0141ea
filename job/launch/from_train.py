"""`python -m job.train --multirun hydra/launcher=...`, which needs no torch.

A launcher sends the points of a sweep away and calls nothing here, so that the program that trains need not be loaded.
"""

from __future__ import annotations

import sys

from job.command import guarded
from job.launch.submission import compose_and_launch
from job.launch.waiting import compare_runs

HERE = ("basic", "joblib")  # Hydra's launchers that train in this process or its children


def launch_if_asked() -> None:
    """Launch what the command line says and end the program; return where it does not ask for a launcher."""
    given = [word.partition("=")[2] for word in sys.argv[1:] if word.startswith("hydra/launcher=")]
    if given and given[-1] not in HERE and {"--multirun", "-m"} & set(sys.argv[1:]):
        sys.exit(guarded(launch_and_compare, output_is_result=False))


def launch_and_compare() -> None:
    """Launch the sweep; where it is waited for, compare its runs at the end."""
    compose_and_launch()
    compare_runs()

"""`python -m job.curves`: draw the curves of a run, also while it runs or after it was stopped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from job.command import guarded
from job.errors import UserError
from job.monitoring.curves import LOGS, write_curves


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.curves",
        description="Draw what a run has logged so far into its curves.png; a run draws it by itself when it ends.",
    )
    p.add_argument("path", type=Path, metavar="RUN", help="run directory")
    p.add_argument("--out", type=Path, help="PNG file to write (curves.png of the run directory)")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    if not any((options.path / name).is_file() for name in LOGS.values()):
        names = " or ".join(LOGS.values())
        raise UserError(f"{options.path}: no {names} in it; give the directory of a run that has logged something")
    print(write_curves(options.path, options.out))


if __name__ == "__main__":
    sys.exit(guarded(main, output_is_result=False))

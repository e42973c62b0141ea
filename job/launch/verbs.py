"""What the command lines of all launchers have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from job.command import guarded


def add_outputs(verbs: Any, dry_run: str) -> None:
    """--json and --dry-run (its help given) of the verbs that have them."""
    for name in ("submit", "list", "status", "resume"):
        verbs.choices[name].add_argument("--json", action="store_true", help="for programs")
    for name in ("submit", "resume"):
        verbs.choices[name].add_argument("--dry-run", action="store_true", help=dry_run)


def run(
    parser: argparse.ArgumentParser,
    submit: Callable[[list[str], argparse.Namespace], None],
    arguments: list[str] | None,
) -> int:
    """Parse a command line and run its verb; `submit` takes what the parser does not know, for job.train. Returns the exit code."""
    options, rest = parser.parse_known_args(arguments)
    if options.function is submit:
        return guarded(lambda: submit(rest, options))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return guarded(lambda: options.function(options))

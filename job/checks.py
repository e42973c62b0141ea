"""What `cyclevae doctor` says of one thing: a verdict, why, and the way out."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

COLUMNS = 118


@dataclass(frozen=True)
class Check:
    """One verdict; the names are the keys of `--json`."""

    name: str
    state: Literal["well", "note", "trouble"]  # a note asks for nothing, or only sometimes
    words: str
    remedy: str = ""


def well(name: str, words: str) -> Check:
    """All is as it should be."""
    return Check(name, "well", words)


def note(name: str, words: str, remedy: str = "") -> Check:
    """Something to know, which keeps no run from training well."""
    return Check(name, "note", words, remedy)


def trouble(name: str, words: str, remedy: str) -> Check:
    """Something that will keep a run from starting, going on, or learning."""
    return Check(name, "trouble", words, remedy)


def show(checks: Sequence[Check], as_json: bool) -> None:
    """Print checks, one a paragraph at most, or as a JSON list."""
    if as_json:
        print(json.dumps([asdict(check) for check in checks]))
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        head = f"{check.state:<7}  {check.name:<{width}}  "
        indent = " " * len(head)
        print(textwrap.fill(check.words, COLUMNS, initial_indent=head, subsequent_indent=indent))
        if check.remedy:
            print(textwrap.fill(f"-> {check.remedy}", COLUMNS, initial_indent=indent, subsequent_indent=indent + "   "))


def all_well(checks: Sequence[Check]) -> bool:
    """Whether none of them is trouble."""
    return all(check.state != "trouble" for check in checks)

"""What the README tells people to type is taken by the commands."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = re.findall(
    r"python -m job\.(prepare|convert|evaluate|sample|benchmark)\b([^`#]*?)\s*(?:[`#]|$)", README, re.MULTILINE
)


def test_the_readme_has_commands() -> None:
    assert {name for name, _ in COMMANDS} == {"prepare", "convert", "evaluate", "sample", "benchmark"}


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_a_command_of_the_readme_is_taken(name: str, arguments: str) -> None:
    words = shlex.split(arguments.removesuffix("..."))
    if "--help" not in words:
        importlib.import_module(f"job.{name}").parser().parse_args(words)

"""What the README tells people to type is taken by the commands."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny_run import tiny_run

from job.config import config_dir

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = re.findall(
    r"python -m job\.(prepare|convert|evaluate|report|sample|encode|decode|benchmark|compare|doctor|plan)\b"
    r"([^`#]*?)\s*(?:[`#]|$)",
    README,
    re.MULTILINE,
)


def test_the_readme_has_commands() -> None:
    assert {name for name, _ in COMMANDS} == {
        "prepare",
        "convert",
        "evaluate",
        "report",
        "sample",
        "encode",
        "decode",
        "benchmark",
        "compare",
        "doctor",
        "plan",
    }


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_a_command_of_the_readme_is_taken(name: str, arguments: str) -> None:
    words = shlex.split(arguments.removesuffix("..."))
    if "--help" not in words:
        _, overrides = importlib.import_module(f"job.{name}").parser().parse_known_args(words)
        assert all(name == "plan" and "=" in word for word in overrides)


def test_the_python_example_runs(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the directory that it is written for: a demo run is there, and no data."""
    example = README[README.index("    from job import load") :].split("\n\n[examples")[0]
    tiny_run(tmp_path / "runs" / "demo", prepared)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(textwrap.dedent(example), names)
    likely, given, trips = (ast.literal_eval(line) for line in capsys.readouterr().out.splitlines())
    assert names["latents"].shape == (2, 8)
    assert all(isinstance(text, str) for text in [*likely, *given])
    assert trips == names["model"].round_trip(names["texts"])


def test_the_line_for_fine_tuning_is_taken() -> None:
    line = re.search(r"python -m job\.train --config-name demo (data\.dir=.*init_from.*)", README)
    assert line is not None
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = OmegaConf.to_object(compose("demo", line.group(1).split()))
    assert config.training.init_from == "runs/demo"  # type: ignore[union-attr]

"""`python -m job.train --help`: every configuration key with its meaning, and the configurations to begin from."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from job.command import HYDRA_OPTIONS, guarded
from job.config import Config, config_dir, default_of, keys
from job.errors import UsageError
from job.versions import program_version

COLUMNS = 100
GROUPS = ("data", "model", "loss", "compat", "hydra/launcher")
DEFAULT_CONFIGURATION = "mmdit_cycle_vae"
INTRODUCTION = """\
usage: python -m job.train [--config-name NAME] [GROUP=OPTION ...] [KEY=VALUE ...]

Trains a model. The same command again goes on from the run's last checkpoint.
"""
MORE = """\
More: --help loss, --help loss.loss_type   all about a section or a key: choices, limits
      --cfg job                            the configuration that a command line makes
      --multirun KEY=A,B                   several runs; clusters: docs/tutorials/sweep-on-slurm.md
      --hydra-help                         Hydra's own options"""


def answer_help() -> None:
    """Print help, or the version, and end the program where the command line asks for it."""
    arguments = sys.argv[1:]
    if "--version" in arguments:  # Hydra would print its own
        sys.exit(guarded(lambda: print(program_version())))
    if {"-h", "--help"} & set(arguments):
        topics = [
            argument
            for argument, before in zip(arguments, ["", *arguments], strict=False)
            if not argument.startswith("-") and "=" not in argument and before not in HYDRA_OPTIONS
        ]
        sys.exit(guarded(lambda: print("\n\n".join(map(about, topics)) if topics else overview())))


def overview() -> str:
    """Configurations, groups and keys, a line each."""
    configurations = [shortened(f"  {path.stem:<24} ", first_comment(path)) for path in primary_configurations()]
    groups = [f"  {group}={'|'.join(options(group))}" for group in GROUPS]
    sections = [
        "\n".join([f"{section}.*: {meaning}", *(key_line(name) for name in names_of(section))])
        for section, meaning in section_meanings().items()
    ]
    return "\n\n".join(
        [
            INTRODUCTION.rstrip(),
            "\n".join([f"Configurations (--config-name, {DEFAULT_CONFIGURATION} without one):", *configurations]),
            "\n".join(["Groups, each option of which sets several keys:", *groups]),
            "Keys with their defaults, of which a configuration may set others:",
            *sections,
            MORE,
        ]
    )


def about(topic: str) -> str:
    """All that is known about a key, or about the keys of a section. UsageError for neither."""
    names = [topic] if topic in keys() else names_of(topic.rstrip("."))
    if not names:
        near = difflib.get_close_matches(topic, [*keys(), *section_meanings()], n=2, cutoff=0.5)
        meant = f"did you mean {' or '.join(near)}?" if near else f"sections are {', '.join(section_meanings())}"
        raise UsageError(f"--help {topic}: no such key or section; {meant}")
    return "\n".join(full_text(name) for name in names)


def full_text(name: str) -> str:
    """A key with its meaning, choices, limits, and the key that decides whether it is read."""
    metadata = keys()[name].metadata
    limits = {"at least": metadata["low"], "more than": metadata["above"], "at most": metadata["high"]}
    facts = [f"{words} {limit}" for words, limit in limits.items() if limit is not None]
    if metadata["choices"]:
        facts.append(f"one of {', '.join(map(str, metadata['choices']))}")
    if metadata["read_if"]:
        other, wanted = metadata["read_if"]
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        facts.append(f"read only with {other}={' or '.join(as_written(value) for value in values)}")
    text = "; ".join([metadata["help"], *facts])
    wrapped = textwrap.wrap(text, COLUMNS, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join([f"{name}={as_written(default_of(keys()[name]))}", *wrapped])


def key_line(name: str) -> str:
    """A key with its default and as much of its meaning as fits."""
    field = keys()[name]
    head = f"  {name.split('.')[1]}={as_written(default_of(field))}"
    return shortened(f"{head:<34} ", field.metadata["help"])


def shortened(head: str, text: str) -> str:
    """A line of COLUMNS at most."""
    return head + textwrap.shorten(text, COLUMNS - len(head), placeholder=" ...")


def as_written(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, str):
        return value
    return json.dumps(value).replace('"', "").replace(" ", "")


def section_meanings() -> dict[str, str]:
    """What each section of the configuration is about: the first line of its class's docstring."""
    meanings = {}
    for section in dataclasses.fields(Config):
        first_line = (section.default_factory.__doc__ or "").splitlines()[0]
        meanings[section.name] = first_line.partition(": ")[2].rstrip(".")
    return meanings


def names_of(section: str) -> list[str]:
    """Dotted keys of a section."""
    return [name for name in keys() if name.split(".")[0] == section]


def primary_configurations() -> list[Path]:
    """The configurations for --config-name."""
    return sorted(path for path in config_dir().glob("*.yaml") if path.stem != "base")


def options(group: str) -> list[str]:
    """The options of a group of configurations."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def first_comment(path: Path) -> str:
    """The first line of a configuration file, which says what it is for."""
    return path.read_text().splitlines()[0].removeprefix("# ")

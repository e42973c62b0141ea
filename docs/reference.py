"""Pages of the reference as Markdown, made of the code at build time: so nothing in them is written twice.

docs/conf.py puts them where a page says ```{from-code} NAME```, NAME being a key of PAGES.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import rules
from job.__main__ import COMMANDS
from job.config import default_of, keys
from job.data import description, shards
from job.errors import EXIT_CODE_MEANINGS
from job.key_help import (
    DEFAULT_CONFIGURATION,
    as_written,
    first_comment,
    names_of,
    overview,
    primary_configurations,
    section_meanings,
)
from job.metric_names import EVALUATION, EVALUATION_SIZE, LOSS_TERMS, OF_EACH_RANK, OF_THE_RUN, Metric

COLUMNS = "100"  # of the help that argparse prints


def configuration() -> str:
    """Every configuration key, a section of the configuration a chapter."""
    chapters = []
    for section, meaning in section_meanings().items():
        entries = "\n\n".join(_key(name) for name in names_of(section))
        chapters.append(f"## `{section}.*`\n\n{_sentence(meaning)}\n\n{entries}")
    return "\n\n".join(chapters)


def _key(name: str) -> str:
    """A key as an entry of a definition list, with an anchor of its own: #loss.loss_type is `loss-loss-type`."""
    field = keys()[name]
    head = f"({_anchor(name)})=\n`{name}` = `{as_written(default_of(field))}`"
    facts = "; ".join(_limits(field.metadata))
    more = f" {_sentence(facts)}" if facts else ""
    return f"{head}\n: {_sentence(_plain(field.metadata['help']))}{more}"


def _limits(metadata: Mapping[Any, Any]) -> Iterator[str]:
    """What a key may be, and the key that decides whether it is read."""
    for bound, words in (("low", "at least"), ("above", "more than"), ("high", "at most")):
        if metadata[bound] is not None:
            yield f"{words} `{metadata[bound]}`"
    if metadata["choices"]:
        yield "one of " + ", ".join(f"`{choice}`" for choice in metadata["choices"])
    if metadata["read_if"]:
        other, wanted = metadata["read_if"]
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        shown = " or ".join(f"`{as_written(value)}`" for value in values)
        yield f"read only with [`{other}`](#{_anchor(other)}) = {shown}"


def metrics() -> str:
    """Every number that a run reports: the terms of the loss, the evaluation, the run, its ranks."""
    terms = [[f"`{term.key}`", _plain(term.words), term.unit, _code(term.weight_key)] for term in LOSS_TERMS]
    return "\n\n".join(
        [
            "## Terms of the objective",
            "In `training_log.jsonl` under these keys, in Prometheus as `cyclevae_loss` with the label `term`.",
            _table(["key", "what it is", "unit", "its weight in the log"], terms),
            "## Of an evaluation",
            "In `evaluation.jsonl` under these keys. A metric by `t` has a value a latent timestep: `KEY@0.9` there.",
            _metric_table((*EVALUATION, *EVALUATION_SIZE)),
            "## Of the run",
            "Of rank 0 alone, since all ranks agree on them.",
            _metric_table(metric for metric in OF_THE_RUN if metric not in (*EVALUATION, *EVALUATION_SIZE)),
            "## Of each rank",
            _metric_table(OF_EACH_RANK),
        ]
    )


def _metric_table(shown: Iterable[Metric]) -> str:
    rows = [
        [_code(metric.key), _code(metric.name), _plain(metric.help), metric.unit, metric.kind, ", ".join(metric.labels)]
        for metric in shown
    ]
    return _table(["key in the logs", "in Prometheus", "what it is", "unit", "kind", "labels"], rows)


def alerts() -> str:
    """Every alert with its condition, how long it must hold, and its runbook."""
    durations = rules.Durations(1)
    return "\n\n".join(_alert(alert, durations(alert.hold)) for alert in rules.alerts(durations))


def _alert(alert: rules.Alert, hold: str) -> str:
    """A chapter. The condition is a block: it is long, and has signs that Markdown reads."""
    held = f"when this holds for {hold}" if alert.hold else "as soon as this holds"
    condition = f"```text\n{alert.signal} {alert.condition}\n```"
    return f"## `{alert.name}`\n\n{alert.runbook}\n\nFires ({alert.severity}) {held}:\n\n{condition}"


def configurations() -> str:
    """What --config-name may name, by the first line of each file."""
    rows = []
    for path in primary_configurations():
        default = " (the default)" if path.stem == DEFAULT_CONFIGURATION else ""
        rows.append([f"`{path.stem}`{default}", _plain(first_comment(path))])
    return _table(["configuration", "what it is"], rows)


# The modules that own a format, whose docstrings describe it.
FORMATS = {
    "Prepared data": "job.data.shards",
    "A checkpoint": "job.runtime.checkpoint",
    "What a model knows of its data": "job.data.description",
    "An exported model": "job.trained",
}


def files() -> str:
    """The formats of files, as the modules that read and write them describe them."""
    chapters = []
    for title, module in FORMATS.items():
        described = inspect.getdoc(importlib.import_module(module)) or ""
        chapters.append(f"## {title}\n\n{_block(described)}")
    return "\n\n".join(chapters)


def format_versions() -> str:
    """The versions that this release writes, and those that it reads besides."""
    older = ", ".join(map(str, shards.OLDER_VERSIONS))
    rows = [
        ["`dataset.json`", str(shards.FORMAT_VERSION), older],
        ["`model.json`", str(description.FORMAT_VERSION), ""],
    ]
    return _table(["file", "`format_version`", "also read"], rows)


def exit_codes() -> str:
    """Every exit code with its meaning, and whether launchers try again."""
    rows = [
        [f"`{int(code)}`", code.name, _plain(meaning), "yes" if code >= 128 else "no"]
        for code, meaning in EXIT_CODE_MEANINGS.items()
    ]
    return _table(["code", "name", "meaning", "started again"], rows)


def command_lines() -> str:
    """The help of every command and of its subcommands, as the terminal shows it."""
    os.environ["COLUMNS"] = COLUMNS
    chapters = []
    for name, meaning in COMMANDS.items():
        chapters.append(f"## `{name}`\n\n{_sentence(_plain(meaning))}\n\n{_help_of(name)}")
    return "\n\n".join(chapters)


def _help_of(command: str) -> str:
    if command == "train":  # Hydra's command line, whose help is our own
        return _block(overview())
    parser: argparse.ArgumentParser = importlib.import_module(f"job.{command}").parser()
    return "\n\n".join(_block(one.format_help()) for one in (parser, *_subcommands(parser)))


def _subcommands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    # argparse has no public way to list them.
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [one for group in groups for one in group.choices.values()]


PAGES: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "configurations": configurations,
    "metrics": metrics,
    "alerts": alerts,
    "files": files,
    "format-versions": format_versions,
    "exit-codes": exit_codes,
    "command-lines": command_lines,
}


# Markdown.


def _anchor(name: str) -> str:
    return name.replace(".", "-").replace("_", "-")


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:].rstrip('.')}."


def _plain(words: str) -> str:
    """Words in which nothing is markup: names with * and _, <term>, alternatives in a table's cell."""
    for mark in "\\*_<>|[]$":
        words = words.replace(mark, f"\\{mark}")
    return words


def _code(words: str) -> str:
    return f"`{words}`" if words else ""


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

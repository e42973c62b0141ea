"""What the command lines of all launchers have in common: `cyclevae LAUNCHER VERB ...`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from job.command import guarded

Parents = Sequence[argparse.ArgumentParser]


def add_submit(
    verbs: Any, function: Callable[..., None], launcher: str, page: str, where: str = "", parents: Parents = ()
) -> None:
    """The verb `submit`. `launcher` is the word after cyclevae, `page` is of the documentation and has all keys of
    hydra.launcher, `where` the launcher's further options as the usage shows them.

    What the parser does not know goes to job.train, so its arguments are described and not declared.
    """
    add_verb(
        verbs,
        "submit",
        function,
        parents,
        help="submit a run or a sweep: the arguments of job.train",
        usage=f"cyclevae {launcher} submit [--dry-run] [--json] {where}[--config-name NAME] OVERRIDES...",
        description="The overrides of `python -m job.train`; a list of values is a sweep: "
        "loss.cycle_text_weight=0.05,0.1. hydra.launcher.KEY=VALUE sets what the cluster is asked for "
        f"(see docs: {page}).",
    )


def add_verb(
    verbs: Any, name: str, function: Callable[..., None], parents: Parents = (), **words: str
) -> argparse.ArgumentParser:
    """A verb that calls `function`, whose docstring is its help unless `words` (of argparse) give another."""
    verb: argparse.ArgumentParser = verbs.add_parser(name, parents=parents, **({"help": function.__doc__} | words))
    verb.set_defaults(function=function)
    return verb


def add_log_options(logs: argparse.ArgumentParser, follow: str, lines: str | None = None) -> None:
    """-f and -n of the verb `logs`, with their help."""
    logs.add_argument("-f", "--follow", action="store_true", help=follow)
    logs.add_argument("-n", "--lines", type=int, default=50, help=lines)


def add_outputs(verbs: Any, dry_run: str) -> None:
    """--json, and --dry-run with this help, of the verbs that have them."""
    for name in ("submit", "list", "status", "resume"):
        verbs.choices[name].add_argument("--json", action="store_true", help="for programs")
    for name in ("submit", "resume"):
        verbs.choices[name].add_argument("--dry-run", action="store_true", help=dry_run)


def run(
    parser: argparse.ArgumentParser,
    submit: Callable[[list[str], argparse.Namespace], None],
    arguments: list[str] | None,
) -> int:
    """Parse a command line and run its verb; `submit` takes what the parser does not know, for job.train.

    Returns the exit code.
    """

    def command() -> object:
        options, rest = parser.parse_known_args(arguments)
        if options.function is submit:
            return submit(rest, options)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return options.function(options)

    return guarded(command)

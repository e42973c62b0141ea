"""Options that several commands share, and numbers with bounds: a bad one is a single line and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from job.config import DecodingConfig
from job.errors import UsageError
from job.files import is_url


class BoundedNumber(argparse.Action):
    """Stores an option's number, or raises UsageError when it is out of bounds.

    argparse's own way, a `type` that raises, prints the whole usage and leaves the error to its last line. Commands
    here end with one line that names option and value, so the check is an action, which knows the option's name.
    """

    def problem(self, value: float) -> str | None:
        """What to give instead of `value`; None when it is within bounds."""
        raise NotImplementedError

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if problem := self.problem(values):  # type: ignore[arg-type]  # one number: these options take no nargs
            raise UsageError(f"{self.option_strings[0]} {values}: {problem}")
        setattr(namespace, self.dest, values)


def at_least(low: float, at_most: float | None = None) -> type[BoundedNumber]:
    """Action of an option that takes `low` and anything above it, up to `at_most` where that is given."""

    class AtLeast(BoundedNumber):
        def problem(self, value: float) -> str | None:
            if at_most is not None and value > at_most:
                return f"give at most {at_most}"
            return None if value >= low else f"give at least {low}"

    return AtLeast


class Fraction(BoundedNumber):
    """Action of an option that takes a share of something: more than none of it, and less than all or the default."""

    def problem(self, value: float) -> str | None:
        """What to give instead of `value`; None when it is within bounds."""
        return None if 0 < value < 1 or value == self.default else "give a value between 0 and 1"


def path_or_url(name: str) -> Path | str:
    """A name as a path, unless it is the URL of a store, whose two slashes a path would make one."""
    return name if is_url(name) else Path(name)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--data, --cache-dir and --ema: with what data, and which of its weights, a trained model is used."""
    parser.add_argument(
        "--data", type=path_or_url, help="prepared data directory or its URL (s3://...), if not the run's own"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="directory into which data of a URL is copied, once (the run's data.cache_dir)",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="take the moving average of the weights (if there is one, as training does)",
    )


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """--seed and --batch-size: how a trained model is applied to what is in a file."""
    parser.add_argument("--seed", type=int, action=at_least(0), default=0, help="seed of the noise (0)")
    parser.add_argument("--batch-size", type=int, action=at_least(1), default=64, help="rows per pass (64)")


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """--steps, --temperature and so on: one option for every key of the configuration's section `decoding`."""
    group = parser.add_argument_group("decoding", "what is left out is as the run's configuration says (decoding.*)")
    for declared in dataclasses.fields(DecodingConfig):
        kind, low = type(declared.default), declared.metadata["low"]
        if low is None:  # the key is above 0 then
            low = 1 if kind is int else 0
        name = f"--{declared.name.replace('_', '-')}"
        group.add_argument(name, type=kind, action=at_least(low), help=declared.metadata["help"])


def given_decoding(options: argparse.Namespace) -> dict[str, Any]:
    """The keys of `decoding` that the command line sets."""
    values = {declared.name: getattr(options, declared.name) for declared in dataclasses.fields(DecodingConfig)}
    return {name: value for name, value in values.items() if value is not None}


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """--device: where a trained model runs."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the model runs; auto takes a GPU where there is one (auto)",
    )

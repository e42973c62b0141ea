"""Options with bounds: a bad number is one line that names option and value."""

from __future__ import annotations

import argparse

import pytest

from job.arguments import Fraction, at_least
from job.errors import ExitCode, UsageError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser()
    p.add_argument("--count", "-c", type=int, action=at_least(2), default=1)
    p.add_argument("--seed", type=int, action=at_least(0, at_most=9))
    p.add_argument("--share", type=float, action=Fraction)
    return p


def test_numbers_within_bounds_are_stored() -> None:
    options = parser().parse_args(["--count", "2", "--share", "0.5"])
    assert (options.count, options.share) == (2, 0.5)
    assert parser().parse_args([]).count == 1  # a default is the program's own and need not lie within them


def test_a_share_may_be_its_default() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--encoded", type=float, action=Fraction, default=1.0)
    assert p.parse_args(["--encoded", "1"]).encoded == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "1"], "--count 1: give at least 2"),
        (["-c", "1"], "--count 1: give at least 2"),
        (["--coun", "1"], "--count 1: give at least 2"),
        (["--seed", "-1"], "--seed -1: give at least 0"),
        (["--seed", "10"], "--seed 10: give at most 9"),
        (["--share", "0"], "--share 0.0: give a value between 0 and 1"),
        (["--share", "1"], "--share 1.0: give a value between 0 and 1"),
        (["--share", "nan"], "--share nan: give a value between 0 and 1"),
    ],
)
def test_others_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        parser().parse_args(arguments)
    assert str(refused.value) == message
    assert refused.value.exit_code == ExitCode.USAGE

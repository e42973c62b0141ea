"""Records of failures: which one is shown."""

from __future__ import annotations

import json
from pathlib import Path

from job.failure_records import Failure, read_failures
from job.launch.failures import end_of_log, first_cause


def failure(time: float, consequence: bool, message: str = "m") -> Failure:
    return Failure(time, 0, "n", message, 1, consequence)


def test_the_first_failure_that_is_no_consequence() -> None:
    lost, later, cause = failure(1.0, True), failure(3.0, False), failure(2.0, False)
    assert first_cause([lost, later, cause]) is cause
    assert first_cause([failure(5.0, True), lost]) is lost, "better than nothing"
    assert first_cause([]) is None


def test_records_are_read_as_far_as_they_are_whole(tmp_path: Path) -> None:
    """A kill cuts a line short; a newer program may write more fields, another one other records."""
    path = tmp_path / "failures.jsonl"
    assert read_failures(path) == []
    whole = {"time": 1.0, "rank": 2, "node": "n", "message": "m", "exit_code": 134, "consequence": True, "new": 1}
    path.write_text(f'{json.dumps(whole)}\n{{"time": 2.0}}\n{{"time": 3.0, "ra')
    assert read_failures(path) == [Failure(1.0, 2, "n", "m", 134, True)]


def test_a_failure_in_a_line() -> None:
    assert str(failure(1.0, False, "RuntimeError: first\nsecond")) == "rank 0 (n): RuntimeError: first"
    assert str(failure(1.0, False, "")) == "rank 0 (n): no message"


def test_the_end_of_a_log() -> None:
    assert end_of_log("") is None
    told = end_of_log("".join(f"line {number}\n\n" for number in range(20)))
    assert told is not None
    assert told.splitlines()[0] == "no failure was recorded; the last lines of the log:"
    assert told.splitlines()[-1].strip() == "line 19"

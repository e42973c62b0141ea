"""What a launcher reads of a run that failed."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from ranks import start_ranks

from job.command import guarded
from job.errors import ExitCode, LostRankError, RetryError, UserError
from job.files import json_lines
from job.runtime import distributed


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kubernetes" / "failures.jsonl"
    monkeypatch.setenv("CYCLEVAE_FAILURES", str(path))
    return path


def fail(error: BaseException) -> int:
    def command() -> None:
        raise error

    return guarded(command)


@pytest.mark.parametrize(
    ("error", "message", "exit_code", "consequence"),
    [
        (UserError("no data in x"), "no data in x", 1, False),
        (RetryError("the loader died"), "the loader died", 134, False),
        (LostRankError("lost rank 3"), "lost rank 3", 134, True),
        (LostRankError("rank 3 gave up", ExitCode.FAILED), "rank 3 gave up", 1, True),
        (HydraException("mismatched input"), "mismatched input", 2, False),
    ],
)
def test_a_failure_is_one_line_of_json(
    noted: Path, error: Exception, message: str, exit_code: int, consequence: bool
) -> None:
    before = time.time()
    assert fail(error) == exit_code
    (failure,) = json_lines(noted)
    assert before <= failure.pop("time") <= time.time()
    assert failure == {
        "rank": 0,
        "node": socket.gethostname(),
        "message": message,
        "exit_code": exit_code,
        "consequence": consequence,
    }


def test_what_nobody_foresaw_is_noted_with_its_name(noted: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError("division by zero"))
    (failure,) = json_lines(noted)
    assert (failure["message"], failure["exit_code"]) == ("ZeroDivisionError: division by zero", 1)


def test_what_is_no_failure_is_not_noted(noted: Path) -> None:
    assert guarded(lambda: None) == 0
    assert guarded(lambda: ExitCode.STOPPED) == 143
    assert fail(KeyboardInterrupt()) == 130
    assert not noted.exists()


def test_a_file_that_cannot_be_written_changes_no_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CYCLEVAE_FAILURES", str(tmp_path / "file" / "failures.jsonl"))
    assert fail(UserError("no data in x")) == 1
    assert "error: no data in x" in capsys.readouterr().err


def one_of_two(failures: Path, happening: str) -> None:
    os.environ["CYCLEVAE_FAILURES"] = str(failures)

    def command() -> None:
        process = distributed.start("cpu", 20.0)
        distributed.barrier()
        if process.rank == 1:
            if happening == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("shard 7 is corrupt") if happening == "bad data" else ValueError("unforeseen")
        distributed.barrier()

    guarded(command)


@pytest.mark.parametrize(
    ("happening", "codes", "cause"),
    [
        ("bad data", [1, 1], "shard 7 is corrupt"),
        ("a bug", [1, 1], "ValueError: unforeseen"),
        ("killed", [134, -signal.SIGKILL], None),
    ],
)
def test_cause_and_consequence(tmp_path: Path, happening: str, codes: list[int], cause: str | None) -> None:
    """A killed rank leaves no word: the consequences of the others, which name it, are all there is."""
    ranks = start_ranks(2, tmp_path, one_of_two, tmp_path / "failures.jsonl", happening)
    assert [rank.exit_code() for rank in ranks] == codes, ranks[0].said
    noted: dict[int, dict[str, Any]] = {failure["rank"]: failure for failure in json_lines(tmp_path / "failures.jsonl")}
    assert noted[0]["consequence"]
    assert "rank 1 (" in noted[0]["message"]
    assert noted[0]["exit_code"] == codes[0]
    if cause is None:
        assert 1 not in noted
    else:
        assert (noted[1]["message"], noted[1]["consequence"]) == (cause, False)

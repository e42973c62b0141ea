"""How every command ends."""

from __future__ import annotations

import errno

import pytest
from hydra.errors import HydraException

from job.command import guarded
from job.errors import ExitCode, RetryError, UserError


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("no data in x"), ExitCode.FAILED, "error: no data in x\n"),
        (RetryError("lost another rank"), ExitCode.RETRY, "error: lost another rank\n"),
        (HydraException("mismatched input"), ExitCode.USAGE, "error: mismatched input\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/runs"),
            ExitCode.FAILED,
            "error: /runs: Permission denied\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_is_known_ends_in_a_line_and_a_code(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise raised

    assert guarded(command) == code
    assert capsys.readouterr().err == said


def test_what_nobody_foresaw_ends_in_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)


def test_a_command_without_a_result_has_finished() -> None:
    assert guarded(lambda: None) == ExitCode.FINISHED
    assert guarded(lambda: ExitCode.STOPPED) == ExitCode.STOPPED

"""What a run prints while it trains: a line for people, and one for programs where they ask for it."""

from __future__ import annotations

import json
import math
import time

import pytest

from job.monitoring.progress import Progress, clock, rate

VALUES = {"step": 480, "loss": 6.3, "base_l2t_text_loss": 4.0, "cycle_latent_loss": 0.5, "tokens_per_second": 1360.0}


def started_before(seconds: float, status_lines: bool, show: bool = True) -> Progress:
    """Progress of a run that went on from step 400 so many seconds ago."""
    progress = Progress(700, 400, show=show, status_lines=status_lines)
    progress.started = time.monotonic() - seconds
    return progress


def test_a_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    started_before(80, status_lines=False).log(480, VALUES)
    assert capsys.readouterr().out == "step 480/700  loss 6.3  l2t 4  cycle_latent 0.5  1.36k tokens/s  3:40 left\n"


def test_a_line_for_programs_besides(capsys: pytest.CaptureFixture[str]) -> None:
    progress = started_before(80, status_lines=True)
    progress.log(480, VALUES)
    progress.say("evaluation at step 480")
    for_people, for_programs, said = capsys.readouterr().out.splitlines()
    assert for_people.startswith("step 480/700  ")
    assert said == "evaluation at step 480"
    assert json.loads(for_programs) == {
        "cyclevae": "progress",
        "step": 480,
        "steps": 700,
        "loss": 6.3,
        "tokens_per_second": 1360.0,
        "seconds_left": 220,
    }


@pytest.mark.parametrize("loss", [{}, {"loss": math.nan}, {"loss": math.inf}])
def test_a_loss_that_is_not_finite_leaves_the_line_json(
    loss: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    started_before(80, status_lines=True).log(480, {"tokens_per_second": 10.0, **loss})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(capsys.readouterr().out.splitlines()[1], parse_constant=refuse)["loss"] is None


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = started_before(80, status_lines=True, show=False)
    progress.log(480, VALUES)
    progress.say("evaluation")
    assert capsys.readouterr().out == ""


def test_a_reader_that_has_gone_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: object, **keywords: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    started_before(80, status_lines=True).log(480, VALUES)


def test_times_and_rates_are_short() -> None:
    assert (clock(59.9), clock(61), clock(3661)) == ("0:59", "1:01", "1:01:01")
    assert (rate(999.4), rate(12345)) == ("999 tokens/s", "12.3k tokens/s")

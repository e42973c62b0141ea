"""What a run prints while it trains: a line for people, and one for programs where they ask for it."""

from __future__ import annotations

import io
import json
import math
import time

import pytest

from job.metric_names import LOSS_TERMS
from job.monitoring.progress import Progress, clock, rate

VALUES = {"step": 480, "loss": 6.3, "base_l2t_text_loss": 4.0, "cycle_latent_loss": 0.5, "tokens_per_second": 1360.0}


def started_before(seconds: float, status_lines: bool, show: bool = True) -> Progress:
    """Progress of a run that went on from step 400 so many seconds ago."""
    progress = Progress(700, 400, show=show, status_lines=status_lines)
    progress.started = time.monotonic() - seconds
    return progress


def test_a_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    started_before(80, status_lines=False).log(480, VALUES)
    assert capsys.readouterr().out == "step 480/700  loss 6.3  l2t 4  l2t2l 0.5  1.36k tokens/s  3:40 left\n"


ALL_TERMS = {term.key: 1.2345678 for term in LOSS_TERMS if "cycle_vae" in term.modes} | {"loss": 12.345678}


@pytest.mark.parametrize(
    ("step", "total", "values"),
    [
        (480, 700, ALL_TERMS),
        (99_999, 100_000, ALL_TERMS),
        (123_456, 1_000_000, dict.fromkeys(ALL_TERMS, 0.00012345)),
    ],
)
def test_a_line_with_all_terms_fits_100_columns(
    step: int, total: int, values: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(total, 0, show=True)
    progress.started = time.monotonic() - 80_000
    progress.log(step, {**values, "tokens_per_second": 12_345.0})
    line = capsys.readouterr().out.rstrip("\n")
    assert len(line) <= 100
    for term in ("loss", "l2t", "t2l", "t2l2t", "l2t2l", "left"):
        assert f" {term}" in line


def test_a_bar_with_all_terms_fits_100_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Terminal()
    monkeypatch.setattr("sys.stderr", drawn)
    progress = Progress(100_000, 0, show=True)
    progress.update(99_000)
    progress.log(99_000, {**ALL_TERMS, "tokens_per_second": 12_345.0})
    progress.bar.refresh()
    shown = str(progress.bar)
    assert len(shown) <= 100
    assert "l2t2l 1.2" in shown
    progress.close()


class Terminal(io.StringIO):
    """What tells tqdm to draw a bar."""

    def isatty(self) -> bool:
        return True


def test_a_piped_run_prints_its_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(700, 400, show=True)
    progress.first_step(401, 12.34)
    assert capsys.readouterr().out == "step 401/700  first step done in 12.3 s\n"


def test_the_time_left_does_not_count_what_the_first_step_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    progress = started_before(300, status_lines=True)
    progress.first_step(401, 300.0)
    progress.started -= 10
    progress.log(411, VALUES)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds_left"] == 289


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

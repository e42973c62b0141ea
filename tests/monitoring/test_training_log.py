"""A log holds every step once, whatever ended the run or refused the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.files import json_lines
from job.monitoring.training_log import JsonLines


def test_lines_after_the_checkpoint_and_half_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "training_log.jsonl"
    path.write_text('{"step": 10, "loss": 3.0}\n{"step": 20, "loss": 2.0}\n{"step": 30, "lo')
    log = JsonLines(path)
    log.continue_from(10)
    log.write({"step": 20, "loss": 2.5})
    assert json_lines(path) == [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.5}]


def test_what_a_full_disk_refuses_is_written_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "training_log.jsonl"
    log = JsonLines(path)
    log.write({"step": 10})
    kept = path.rename(tmp_path / "elsewhere")
    path.mkdir()  # cannot be opened as a file
    log.write({"step": 20})
    assert "cannot be written" in capsys.readouterr().err
    path.rmdir()
    kept.rename(path)
    log.write({"step": 30})
    assert [line["step"] for line in json_lines(path)] == [10, 20, 30]

"""What is shown of checkpoints: those on disk, and when the next one is due."""

from __future__ import annotations

from pathlib import Path

import pytest

from job import checkpoint_names
from job.config import LoggingConfig
from job.monitoring.saves import expected_save_interval, newest_checkpoint, save_series
from job.runtime.checkpointer import SaveStats


def committed(directory: Path, step: int, size: int) -> None:
    path = directory / checkpoint_names.directory_name(step)
    path.mkdir(parents=True)
    (path / "share").write_bytes(b"x" * size)
    (path / checkpoint_names.COMMIT_FILE).write_bytes(b"{}")


def test_the_newest_committed_checkpoint_is_shown(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "checkpoints") == {}
    committed(tmp_path, 100, 10)
    committed(tmp_path, 20, 1000)
    (tmp_path / f"{checkpoint_names.directory_name(200)}.tmp").mkdir()  # being written
    shown = newest_checkpoint(tmp_path)
    assert shown["cyclevae_checkpoint_step", ()] == 100
    assert shown["cyclevae_checkpoint_size_bytes", ()] == 12
    assert shown["cyclevae_checkpoint_last_success_timestamp_seconds", ()] > 1e9


@pytest.mark.parametrize(
    ("save_freq", "save_minutes", "expected"),
    [(1000, None, 2000.0), (0, 10.0, 600.0), (1000, 10.0, 600.0), (100, 10.0, 200.0), (0, None, None)],
)
def test_the_next_save_is_due_at_the_earlier_of_both(
    save_freq: int, save_minutes: float | None, expected: float | None
) -> None:
    config = LoggingConfig(save_freq=save_freq, save_minutes=save_minutes)
    assert expected_save_interval(config, step_seconds=2.0) == expected


def test_before_the_first_save_there_is_no_duration() -> None:
    stats = SaveStats()
    assert len(save_series(stats)) == 2
    stats.saves, stats.last_save_seconds = 1, 3.0
    assert save_series(stats)["cyclevae_checkpoint_duration_seconds", ()] == 3.0

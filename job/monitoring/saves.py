"""What Prometheus shows of a run's checkpoints: saved by this process, on disk, and when the next one is due."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from job import checkpoint_names
from job.config import LoggingConfig
from job.metric_names import Series


class SaveCounts(Protocol):
    """What the checkpointer counts."""

    saves: int
    failures: int
    last_save_seconds: float
    last_stall_seconds: float
    bytes: int


def save_series(counts: SaveCounts) -> dict[Series, float]:
    """What this process has saved.

    Durations and sizes are those of the last save, so there are none before the first.
    """
    values: dict[Series, float] = {
        ("cyclevae_checkpoint_saves_total", ()): counts.saves,
        ("cyclevae_checkpoint_failures_total", ()): counts.failures,
    }
    if counts.saves:
        values["cyclevae_checkpoint_duration_seconds", ()] = counts.last_save_seconds
        values["cyclevae_checkpoint_stall_seconds", ()] = counts.last_stall_seconds
        values["cyclevae_checkpoint_share_bytes", ()] = counts.bytes
    return values


def newest_checkpoint(directory: Path) -> dict[Series, float]:
    """Step, time and size of the newest committed checkpoint, as they are on disk.

    Read from there and not from the checkpointer, so that a run which was started again shows the checkpoint that it
    goes on from.
    """
    steps = checkpoint_names.steps(directory)
    if not steps:
        return {}
    newest = directory / checkpoint_names.directory_name(steps[-1])
    try:
        size = sum(file.stat().st_size for file in newest.iterdir())
        committed = (newest / checkpoint_names.COMMIT_FILE).stat().st_mtime
    except FileNotFoundError:  # replaced by a newer one meanwhile
        return {}
    return {
        ("cyclevae_checkpoint_step", ()): steps[-1],
        ("cyclevae_checkpoint_size_bytes", ()): size,
        ("cyclevae_checkpoint_last_success_timestamp_seconds", ()): committed,
    }


def expected_save_interval(config: LoggingConfig, step_seconds: float) -> float | None:
    """Seconds between checkpoints at this step time; None when they come only at the end."""
    intervals = []
    if config.save_freq:
        intervals.append(config.save_freq * step_seconds)
    if config.save_minutes:
        intervals.append(60 * config.save_minutes)
    return min(intervals, default=None)

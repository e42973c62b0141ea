"""What `cyclevae doctor --slurm` makes of SLURM's answers; tests/slurm asks a real cluster."""

from __future__ import annotations

import pytest

from job.errors import JobError
from job.launch.slurm import health, scheduler
from job.launch.slurm.health import accounting_check, partition_check, slurm_checks


def answers(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    def output(*command: str) -> str:
        if text is None:
            raise JobError(f"{command[0]}: no answer")
        return text

    monkeypatch.setattr(scheduler, "output", output)


def test_partitions_and_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "main*|up|2|gpu:8|1-00:00:00\nold|down|1|(null)|infinite\n")
    assert partition_check().words == "main* (2 nodes, GPUs: gpu:8, limit 1-00:00:00)"
    assert accounting_check().state == "well"
    answers(monkeypatch, "old|down|1|(null)|infinite\n")
    assert (partition_check().state, partition_check().words) == ("trouble", "none is up")
    answers(monkeypatch, None)
    assert (partition_check().state, accounting_check().state) == ("trouble", "note")


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health.shutil, "which", lambda name: None if name == "srun" else name)
    (check,) = slurm_checks()
    assert (check.state, check.words) == ("trouble", "srun not found")
    monkeypatch.setattr(health.shutil, "which", str)
    answers(monkeypatch, None)
    assert [check.state for check in slurm_checks()] == ["well", "trouble"]

"""Times of phases and parts add up over an interval, and the next one starts at zero."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch

from job.monitoring.phases import Parts, Phases, process_start


@dataclass
class Clock:
    """In place of time.perf_counter: stands still unless it is moved."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_phases_are_summed_for_the_interval_and_for_ever(clock: Clock) -> None:
    phases = Phases()
    for seconds in (1.0, 2.0):
        with phases("step"):
            clock.now += seconds
    assert phases.read() == {"step": 3.0}
    assert phases.read()["step"] == 0

    def fail() -> None:
        clock.now += 0.5
        raise KeyError

    with pytest.raises(KeyError), phases("step"):
        fail()
    assert phases.read() == {"step": 0.5}
    assert phases.total == {"step": 3.5}


def test_parts_are_means_over_the_steps(clock: Clock) -> None:
    parts = Parts(torch.device("cpu"))
    for _ in range(4):
        for _ in range(2):  # micro-batches
            with parts("forward"):
                clock.now += 0.25
        parts.end_step()
    assert parts.read() == {"forward_seconds": 0.5}
    assert parts.read() == {}


def test_the_start_of_the_process_is_before_its_imports() -> None:
    assert 0 < time.time() - process_start() < 24 * 3600

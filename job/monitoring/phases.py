"""Where the time of a run goes: phases of the loop, by the host's clock, and parts of the step, by the device's."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MOST_EVENTS = 256  # timed parts an interval on a GPU; the steps beyond are taken to be like them


class Phases:
    """Seconds spent in named phases of the loop, in all and since the last read."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self._interval: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._interval[name] += seconds  # type: ignore[assignment]  # Counter holds any number
            self.total[name] += seconds  # type: ignore[assignment]

    def read(self) -> Counter[str]:
        """Seconds of each phase since the last read (0 for others)."""
        interval, self._interval = self._interval, Counter()
        return interval


class Parts:
    """Seconds per step that the device spends in named parts of it, read without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._steps = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self._on_gpu:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started
        elif len(self._events) < MOST_EVENTS:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            yield

    def end_step(self) -> None:
        """Count a step, unless events had run out before its end."""
        self._steps += not self._on_gpu or len(self._events) < MOST_EVENTS

    def read(self) -> dict[str, float]:
        """Mean seconds per step of each part since the last read, as `<part>_seconds`. On a GPU, call it when the steps' results are on the host."""
        for name, begin, end in self._events:
            if end.query():
                self._seconds[name] += begin.elapsed_time(end) / 1000
        means = {f"{name}_seconds": seconds / max(1, self._steps) for name, seconds in self._seconds.items()}
        self._events, self._steps = [], 0
        self._seconds.clear()
        return means


def process_start() -> float:
    """When this process was started, in seconds since 1970."""
    ticks_since_boot = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks_since_boot / 100  # USER_HZ is 100 wherever Linux runs
    return time.time() - age

"""Where the time of a run goes: phases of the loop, by the host's clock, and parts of the step, by the device's."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Timed parts per log interval on a GPU. Every part takes two events of the driver, which live until the interval is
# read; without a limit a long interval would hold thousands. The steps beyond are taken to be like those before.
MOST_EVENTS = 256


class Phases:
    """Seconds spent in named phases of the loop, in all and since the last read.

    A phase is timed on the host. On a GPU the host runs ahead: it queues a step's work and waits only when it reads a
    result, once per log interval. A single step's time may therefore be too short, but the sum over an interval is
    right, since reading is in it.
    """

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
    """Seconds per step that the device spends in named parts of it, read without waiting for the device.

    On a GPU the host's clock would time the queueing, not the work. So an event is queued before and after each part,
    and the GPU itself notes when it comes to them; the times are read when the interval ends and the GPU has passed
    them anyway.
    """

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
        """Count a step, unless the events ran out before its end: then some of its parts are missing from the sums."""
        if not self._on_gpu or len(self._events) < MOST_EVENTS:
            self._steps += 1

    def read(self) -> dict[str, float]:
        """Mean seconds per step of each part since the last read, as `<part>_seconds`.

        On a GPU, call it when the results of the steps are on the host: an event that the GPU has not come to yet is
        left out.
        """
        for name, begin, end in self._events:
            if end.query():
                self._seconds[name] += begin.elapsed_time(end) / 1000
        means = {f"{name}_seconds": seconds / max(1, self._steps) for name, seconds in self._seconds.items()}
        self._events, self._steps = [], 0
        self._seconds.clear()
        return means


def process_start() -> float:
    """When this process was started, in seconds since 1970: earlier than any line of Python could note it."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2]  # the name may hold spaces and brackets
    ticks_since_boot = float(after_name.split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks_since_boot / 100  # USER_HZ is 100 wherever Linux runs
    return time.time() - age

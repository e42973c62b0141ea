"""What takes the time in a step: a GPU's kernels, or a CPU's operators, as PyTorch's profiler sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from job.benchmarking.measure import Case, Shape
from job.runtime.launcher_variables import let_profiler_be_silent

WARM_UPS = 3  # steps before the one that counts: kernels are built, chosen and recorded


@dataclass(frozen=True)
class Profile:
    """Of one step. What runs beside something else is busy once, but counts twice in the sum of seconds."""

    seconds: dict[str, list[float]]  # by kernel: of each call
    busy: float  # seconds in which something ran
    whole: float  # seconds from the first beginning to the last end


def profile_step(values: dict[str, Any], shape: Shape, device: torch.device) -> Profile:
    """A step of one setting: kernels of a GPU, or operators of a CPU without what they call."""
    case = Case(values, shape, device)
    for _ in range(WARM_UPS):
        case.step()
    let_profiler_be_silent()
    is_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiled:
        case.start_step()
        if is_gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if is_gpu else DeviceType.CPU
    events = [event for event in profiled.events() or [] if event.device_type == kind]
    seconds: dict[str, list[float]] = {}
    for event in events:
        of_call = event.time_range.elapsed_us() if is_gpu else event.self_cpu_time_total
        seconds.setdefault(event.name, []).append(of_call / 1e6)
    busy, whole = covered([(event.time_range.start, event.time_range.end) for event in events])
    return Profile(seconds, busy / 1e6, whole / 1e6)


def covered(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """How much spans of time cover together, and how long it is from the first beginning to the last end."""
    spans = sorted(spans)
    covered, end = 0.0, spans[0][0]
    for start, stop in spans:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered, end - spans[0][0]

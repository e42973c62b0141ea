"""What the device of a rank holds, does, and could do. Without a GPU the host takes its place."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import torch

# Dense bf16 operations a second by a part of the GPU's name, as NVIDIA states them; more special names come first.
BF16_PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that the device can do in matrix products of this type: known of the GPU, else measured in some milliseconds."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in BF16_PEAK.items() if part in name), None)
        if known is not None:
            return known
    size, tries = (
        (4096, 4) if device.type == "cuda" else (512, 25)
    )  # short, so that other processes leave some of them alone
    a = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def host_memory_limit() -> int:
    """Bytes this process may use: of its control group, or all of the host's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, int(limit))


class Device:
    """Readings for the loop, which take microseconds and wait for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._busy, self._wall = time.process_time(), time.monotonic()

    def read(self) -> dict[str, float]:
        """Memory in use, at most in use and in all, in bytes, and the share of time in which the device computed since the last read."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return {
                "device_memory_used_bytes": total - free,
                "device_memory_limit_bytes": total,
                "device_memory_peak_bytes": torch.cuda.max_memory_allocated(self._device),
                **self._gpu_utilization(),
            }
        busy, wall = time.process_time(), time.monotonic()
        share = (busy - self._busy) / max(1e-9, wall - self._wall) / len(os.sched_getaffinity(0))
        self._busy, self._wall = busy, wall
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "device_memory_used_bytes": resident,
            "device_memory_limit_bytes": host_memory_limit(),
            "device_memory_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "device_utilization": min(1.0, share),
        }

    def _gpu_utilization(self) -> dict[str, float]:
        try:
            return {"device_utilization": torch.cuda.utilization(self._device) / 100}
        except (
            ModuleNotFoundError,
            RuntimeError,
        ):  # NVML's Python binding is not installed, or the driver does not tell (MIG)
            return {}

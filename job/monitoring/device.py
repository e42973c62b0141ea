"""What the device of a rank holds, does, and could do. Without a GPU the host takes its place."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path

import torch

# Dense bf16 operations a second, from NVIDIA's data sheets, by a part of the GPU's name. The first that fits counts,
# so more special names come first.
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
# GiB that PyTorch sees of these GPUs' memory; of those that come with two sizes, the larger.
MEMORY_GIB = {
    "B200": 178.0,
    "H200": 139.8,
    "H100 PCIe": 79.1,
    "H100": 79.1,
    "A100": 79.1,
    "L40S": 44.4,
    "A10": 22.0,
    "RTX 4090": 23.6,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that the device can do in matrix products of this type: known of the GPU, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in BF16_PEAK.items() if part in name), None)
        if known is not None:
            return known
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of several matrix products, measured in some milliseconds.

    The products are short, so that on a busy machine at least one of them runs undisturbed.
    """
    size, tries = (4096, 4) if device.type == "cuda" else (512, 25)
    a = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def host_memory_limit() -> int:
    """Bytes this process may use: of its control group (a container, a SLURM job), or all of the host's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, int(limit))


class Device:
    """Readings of a rank's device, which take microseconds and wait for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._busy, self._wall = time.process_time(), time.monotonic()

    def read(self) -> dict[str, float]:
        """By keys of the log: bytes in use, most in use and in all, and the share of time in which it computed."""
        return self._read_gpu() if self._device.type == "cuda" else self._read_host()

    def _read_gpu(self) -> dict[str, float]:
        free, total = torch.cuda.mem_get_info(self._device)
        values: dict[str, float] = {
            "device_memory_used_bytes": total - free,
            "device_memory_limit_bytes": total,
            "device_memory_peak_bytes": torch.cuda.max_memory_allocated(self._device),
        }
        # NVML's Python binding may not be installed, and of a GPU that is divided by MIG the driver does not tell.
        with contextlib.suppress(ModuleNotFoundError, RuntimeError):
            values["device_utilization"] = torch.cuda.utilization(self._device) / 100
        return values

    def _read_host(self) -> dict[str, float]:
        busy, wall = time.process_time(), time.monotonic()
        processors = len(os.sched_getaffinity(0))
        share = (busy - self._busy) / max(1e-9, wall - self._wall) / processors
        self._busy, self._wall = busy, wall
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "device_memory_used_bytes": resident_pages * os.sysconf("SC_PAGE_SIZE"),
            "device_memory_limit_bytes": host_memory_limit(),
            "device_memory_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "device_utilization": min(1.0, share),
        }

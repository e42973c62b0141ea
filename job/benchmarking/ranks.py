"""The cost of a step on several processes of one machine, each with a batch of its own (weak scaling)."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from job.benchmarking.measure import Case, Shape


def step_seconds(values: dict[str, Any], shape: Shape, device: str, ranks: int, repeats: int) -> float:
    """Median seconds of a step on so many ranks: on a CPU with gloo and an equal share of cores, else a GPU each."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_rank, (values, shape, device, ranks, repeats, directory), nprocs=ranks)
        return statistics.median(float(seconds) for seconds in (Path(directory) / "seconds").read_text().split())


def _rank(
    rank: int, values: dict[str, Any], shape: Shape, device: str, ranks: int, repeats: int, directory: str
) -> None:
    here = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks
    )
    case = Case(values, shape, here)
    seconds = [sum(case.step()[0].values()) for _ in range(repeats + 1)][1:]
    if rank == 0:
        (Path(directory) / "seconds").write_text(" ".join(map(str, seconds)))
    dist.barrier()
    dist.destroy_process_group()

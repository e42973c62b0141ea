"""What it costs that a run cannot be lost: the stall of a save, and how long a resume takes as the data grows."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from job.data.loader import BatchFormat, BatchSplit, Loader
from job.data.sampler import Sampler
from job.data.shards import DatasetInfo
from job.runtime.checkpointer import Checkpointer
from job.runtime.distributed import Process

STATE = ("weights", "first_moment", "second_moment")
COLUMNS = 64
ALONE = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), node="benchmark")


def checkpoint_stall(parameters: int, repeats: int) -> dict[str, float]:
    """Median seconds that training waits for a save of float32 weights with Adam's two moments.

    Three ways: staged (as a run saves), blocking until it is on the disk, and by torch.save.
    """
    tensors = {name: torch.randn(math.ceil(parameters / COLUMNS), COLUMNS) for name in STATE}
    seconds: dict[str, list[float]] = {"staged": [], "blocking": [], "torch_save": []}
    with tempfile.TemporaryDirectory() as directory:
        checkpointer = Checkpointer(Path(directory), ALONE, keep_last=1, keep_every=0, log=lambda _: None)
        checkpointer.prepare(tensors)
        for number in range(repeats):
            for kind, blocking in (("staged", False), ("blocking", True)):
                checkpointer.save(2 * number + blocking + 1, tensors, {}, blocking=blocking)
                seconds[kind].append(checkpointer.stats.last_stall_seconds)
                checkpointer.wait()
            started = time.perf_counter()
            torch.save(tensors, Path(directory) / "torch.pt")
            seconds["torch_save"].append(time.perf_counter() - started)
    return {f"{kind}_seconds": median(values) for kind, values in seconds.items()} | {"parameters": parameters}


class FreeDataset:
    """A dataset of `count` samples that cost nothing to read, so that only the way to a sample is measured."""

    fingerprint = ""

    def __init__(self, count: int) -> None:
        self.count = count
        self.info = DatasetInfo(
            vocab_size=16,
            latent_dim=4,
            max_length=8,
            mask_token_id=1,
            pad_token_id=0,
            counts={},
            shards={},
            latent_mean=[0.0] * 4,
            latent_std=[1.0] * 4,
            token_counts=[],
            encoder={},
            tokenizer=None,
            files={},
            options={},
            generated_by="benchmark",
        )

    def __len__(self) -> int:
        return self.count

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), 8)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(8, 2), np.zeros(4, np.float32)


def resume_seconds(samples: int, repeats: int, global_batch_size: int = 64) -> float:
    """Median seconds from nothing to the first batch of a run that goes on in the middle of its third epoch."""
    seconds = []
    for seed in range(repeats):
        started = time.perf_counter()
        data = FreeDataset(samples)
        sampler = Sampler(data, samples, global_batch_size, seed)
        loader = Loader(data, sampler, BatchFormat(max_seq_len=8), BatchSplit(0, 1, global_batch_size))
        step = int(2.5 * samples / global_batch_size)
        next(loader.steps(step, step + 1))
        seconds.append(time.perf_counter() - started)
    return median(seconds)

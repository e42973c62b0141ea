"""What a rank reads of a dataset that no page of is in memory: `python tests/data/cold_reads.py DATA`.

The first steps of one rank of 64, of a global batch of 2,048 rows: once as before November 2026, once with lengths of
all rows in memory (job.data.shards.INDEXED_ROWS) and without the system's reading ahead. Linux; the page cache of the
dataset's files is dropped before.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from job.data import shards
from job.data.loader import BatchFormat, BatchSplit, Loader
from job.data.sampler import Sampler

GLOBAL_BATCH, RANKS, STEPS = 2048, 64, 10


def forget(directory: Path) -> None:
    """Drop the files from the page cache."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_from_disk() -> int:
    """Bytes that this process had to be given by a disk."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def measure(directory: Path, way: str) -> None:
    """Print what the steps read."""
    if way == "before":
        shards.INDEXED_ROWS = 0
        del mmap.MADV_RANDOM
    forget(directory)
    dataset = shards.ShardDataset(directory, "train")
    sampler = Sampler(dataset, len(dataset), GLOBAL_BATCH, seed=0)
    loader = Loader(dataset, sampler, BatchFormat(dataset.info.max_length), BatchSplit(0, RANKS, GLOBAL_BATCH // RANKS))
    print(f"{len(dataset)} rows, {way}")
    for step in range(STEPS):
        faults, read, began = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, read_from_disk(), time.monotonic()
        loader.micro_batch(step, 0)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
        megabytes, milliseconds = (read_from_disk() - read) / 1e6, 1e3 * (time.monotonic() - began)
        print(f"  step {step}: {faults} pages waited for, {megabytes:.1f} MB from disk, {milliseconds:.0f} ms")


def main() -> None:
    """The command: each way in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=("before", "now"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        measure(arguments.data, arguments.only)
        return
    for way in ("before", "now"):
        subprocess.run([sys.executable, __file__, str(arguments.data), "--only", way], check=True)


if __name__ == "__main__":
    main()

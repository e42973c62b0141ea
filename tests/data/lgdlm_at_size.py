"""Convert many of LGDLM's small files and measure it: `python tests/data/lgdlm_at_size.py DIR [--workers 1 2]`.

The samples are made up, 128 places for tokens and a latent of 768 numbers each, and kept in DIR. For each number of
workers the files are read once by so many processes that do nothing else, which is what the disk can do, and then
converted; before each, their pages are dropped from memory (their directory entries are not), and once more they are
converted from memory. Linux. The datasets of all numbers of workers must be equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

PLACES, DIMENSIONS, VOCABULARY = 128, 768, 30_522
OPTIONS = ["--mask-token-id", "1", "--pad-token-id", "0", "--vocab-size", str(VOCABULARY)]


def write_samples(directory: Path, count: int) -> None:
    """Write so many pairs of files, as the research code does."""
    generator = np.random.default_rng(0)
    for name in ("tokens", "latents"):
        (directory / name).mkdir(parents=True)
    for number in range(count):
        mask = (np.arange(PLACES) < generator.integers(8, PLACES + 1)).astype(np.int64)
        ids = generator.integers(2, VOCABULARY, PLACES) * mask
        np.savez(directory / "tokens" / f"{number:08d}_tokens.npz", input_ids=ids, attention_mask=mask)
        latent = generator.standard_normal((1, DIMENSIONS), np.float32)
        np.save(directory / "latents" / f"{number:08d}.npy", latent)


def names(directory: Path) -> list[str]:
    """All of the files."""
    return sorted(entry.path for name in ("tokens", "latents") for entry in os.scandir(directory / name))


def forget(paths: list[str]) -> None:
    """Drop the files from the page cache."""
    os.sync()
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(paths: list[str]) -> int:
    """Read the files and do nothing with them; returns their bytes."""
    size = 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            size += len(file.read())
    return size


def read_all(paths: list[str], processes: int) -> None:
    """Read the files in so many processes."""
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(read, [paths[rank::processes] for rank in range(processes)]))


def convert(directory: Path, out: Path, options: list[str]) -> None:
    """Run the command. Ends the program where it fails."""
    shutil.rmtree(out, ignore_errors=True)
    places = [str(directory / "tokens"), str(directory / "latents"), str(out)]
    command = [sys.executable, "-m", "job.convert", "data", *places, *OPTIONS, *options]
    if subprocess.run(command).returncode:
        sys.exit("the conversion failed")


def seconds(work: Callable[[], object]) -> float:
    """How long some work takes."""
    began = time.monotonic()
    work()
    return round(time.monotonic() - began, 1)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    directory = arguments.directory / str(arguments.samples)
    if not directory.exists():
        write_samples(directory, arguments.samples)
    paths = names(directory)
    described = set()
    for workers in arguments.workers:
        out = arguments.directory / f"dataset-{workers}"
        work = partial(convert, directory, out, ["--workers", str(workers)])
        forget(paths)
        reading = seconds(partial(read_all, paths, workers))
        forget(paths)
        cold, warm = seconds(work), seconds(work)
        described.add((out / "dataset.json").read_bytes())
        result = {
            "samples": arguments.samples,
            "workers": workers,
            "reading_alone": reading,
            "cold": cold,
            "warm": warm,
        }
        print(json.dumps(result), flush=True)
    if len(described) > 1:
        sys.exit("the datasets differ")


if __name__ == "__main__":
    main()

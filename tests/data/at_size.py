"""Prepare many short texts and measure it: `python tests/data/at_size.py --texts 10000000 [--processes 2] DIR`.

The texts are made up, the same ones for the same number: words of syllables, as frequent as Zipf's law has it, one text
in fifty said before. Printed are the seconds, the texts a second and the memory of all processes together at its peak.
What is behind `--` goes to `python -m job.prepare`. DIR keeps the texts; the dataset in it is made anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

WORDS = 300_000
CHUNK = 100_000  # texts made at once
REPEATED = 50  # every so many texts, one that was there before
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
LOOK_SECONDS = 0.1


def made_up_words(generator: np.random.Generator) -> np.ndarray:
    """Words of one to four syllables, the frequent ones short; some are spelled alike."""
    syllables = np.array([a + b for a in CONSONANTS for b in VOWELS])
    lengths = np.minimum(4, 1 + np.log10(np.arange(1, WORDS + 1)).astype(int))
    drawn = syllables[generator.integers(0, len(syllables), (WORDS, 4))]
    return np.array(["".join(row[:length]) for row, length in zip(drawn, lengths, strict=True)])


def write_texts(path: Path, count: int) -> None:
    """Write so many texts, a line each."""
    generator = np.random.default_rng(0)
    words = made_up_words(generator)
    shares = 1 / (np.arange(WORDS) + 2.7)
    until = np.cumsum(shares / shares.sum())
    with path.open("w") as file:
        for start in range(0, count, CHUNK):
            lengths = generator.integers(4, 14, min(CHUNK, count - start))
            drawn = np.minimum(np.searchsorted(until, generator.random(lengths.sum())), WORDS - 1)
            pieces = np.split(words[drawn], np.cumsum(lengths)[:-1])
            texts = [" ".join(piece) for piece in pieces]
            texts[REPEATED - 1 :: REPEATED] = texts[: len(texts) // REPEATED]
            file.write("\n".join(texts) + "\n")


def resident_bytes(process: int) -> int:
    """Memory that a process holds now, of its own and not of files; none of one that is gone."""
    try:
        with open(f"/proc/{process}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return 1024 * int(fields["RssAnon"].split()[0])
    except (OSError, KeyError, ValueError):
        return 0


def measured(command: list[str], processes: int) -> tuple[float, int]:
    """Seconds, and bytes of all processes together at the peak. Ends the program where one fails."""
    began = time.monotonic()
    started = [
        subprocess.Popen(command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(processes)})
        for rank in range(processes)
    ]
    peak = 0
    while any(process.poll() is None for process in started):
        peak = max(peak, sum(resident_bytes(process.pid) for process in started))
        time.sleep(LOOK_SECONDS)
    if any(process.returncode for process in started):
        sys.exit("the preparation failed")
    return time.monotonic() - began, peak


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--texts", type=int, default=10_000_000)
    parser.add_argument("--processes", type=int, default=1)
    arguments, options = parser.parse_known_args()
    source = arguments.directory / f"{arguments.texts}.txt"
    out = arguments.directory / "dataset"
    shutil.rmtree(out, ignore_errors=True)
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        write_texts(source, arguments.texts)
    command = [sys.executable, "-m", "job.prepare", "--source", str(source), "--out", str(out)]
    command += [option for option in options if option != "--"]
    seconds, peak = measured(command, arguments.processes)
    result = {
        "texts": arguments.texts,
        "processes": arguments.processes,
        "megabytes": round(source.stat().st_size / 1e6),
        "seconds": round(seconds),
        "texts_per_second": round(arguments.texts / seconds),
        "peak_gb": round(peak / 1e9, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

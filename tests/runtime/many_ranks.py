"""What the control plane costs with many ranks: real processes that join, agree and lose one another, and do not train.

    python tests/runtime/many_ranks.py --ranks 64

Steps are pauses, so that many ranks find room on a few cores; figures of more ranks than cores are an upper bound.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ranks import Rank, start_ranks

from job.errors import LostRankError
from job.runtime import distributed
from job.runtime.watchdog import Watchdog

REPEATS = 20
STEP_SECONDS = 0.3
EVALUATION_FLOATS = 64 * 768 * 5  # what a rank gathers for one batch of an evaluation, about


def rank_of_a_run(timeout: float) -> None:
    """One rank: rank 0 prints figures as JSON lines; at the end all wait for one that was killed."""
    began = time.monotonic()
    process = distributed.start("cpu", timeout)
    say(process, "seconds to join", time.monotonic() - began)
    distributed.barrier()
    say(process, "seconds of an agreement that is waited for", median(lambda: distributed.agree_max(0)))
    say(
        process,
        f"seconds added to a pause of {STEP_SECONDS} s by one that travels",
        median(step) - STEP_SECONDS,
    )
    rows = {"latents": torch.zeros(EVALUATION_FLOATS)}
    began = time.monotonic()
    distributed.gather(rows)
    say(process, "seconds to gather an evaluation", time.monotonic() - began)
    distributed.barrier()
    print("ready", flush=True)
    with Watchdog(timeout) as watchdog:
        for number in itertools.count():
            watchdog.beat(number, "training")
            try:
                step()
            except LostRankError as error:  # as the program does (job.command)
                distributed.give_up(str(error), error.exit_code)
                raise


def step() -> None:
    agreement = distributed.agree_meanwhile(lambda: [0, 0])
    time.sleep(STEP_SECONDS)
    agreement()


def median(function: Any) -> float:
    seconds = []
    for _ in range(REPEATS):
        began = time.monotonic()
        function()
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def say(process: distributed.Process, what: str, seconds: float) -> None:
    if process.is_main:
        print(json.dumps({what: round(seconds, 4)}), flush=True)


def lose_one(ranks: list[Rank]) -> tuple[float, int]:
    """Kill the last rank; seconds until all others had ended, and how many of them named it."""
    killed = time.monotonic()
    ranks[-1].send(signal.SIGKILL)
    for rank in ranks[:-1]:
        rank.process.join(300)
    return time.monotonic() - killed, sum(f"rank {len(ranks) - 1} (" in rank.said for rank in ranks[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="What agreement between many ranks costs.")
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for a rank")
    options = parser.parse_args()
    print(f"{options.ranks} ranks on {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        ranks = start_ranks(options.ranks, Path(directory), rank_of_a_run, options.timeout)
        for rank in ranks:
            rank.wait_for("ready", options.timeout)
        print("\n".join(line for line in ranks[0].said.splitlines() if line.startswith("{")), flush=True)
        seconds, named = lose_one(ranks)
        print(f"a killed rank: {named} of {len(ranks) - 1} others named it, all had ended after {seconds:.1f} s")


if __name__ == "__main__":
    main()

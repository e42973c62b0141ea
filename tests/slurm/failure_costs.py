"""What failures cost a run on a private SLURM cluster: kills a rank at seeded random moments and reads goodput.json.

    python tests/slurm/failure_costs.py --kills 3 --every 60

Prints the seconds from each kill to the first step that had not been done before, and where the run's time went.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster import cluster, wait_for
from slurm_runs import OVER, ROOT, Slurm

HOUR = 3600.0


def last_step(run: Path) -> int:
    """The last step that was logged."""
    log = run / "training_log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def ranks_of(run: Path) -> list[int]:
    """Process ids of a run's ranks: all of this machine, as the cluster's nodes are."""
    found = subprocess.run(
        ["pgrep", "-f", "--", f"-m job.train .*save_dir={run.parent} "], capture_output=True, text=True
    )
    pids = [int(pid) for pid in found.stdout.split()]
    return [pid for pid in pids if Path(f"/proc/{pid}/exe").resolve().name.startswith("python")]


def kill_one(run: Path, dice: random.Random) -> float:
    """Kill a rank; returns the seconds until the run has done a step that is new."""
    began = time.time()
    os.kill(dice.choice(ranks_of(run)), signal.SIGKILL)
    wait_for(lambda: not (run / "slurm" / "alive").exists(), "the other rank to end", HOUR)
    furthest = last_step(run)  # the other may have done a few more steps before it noticed
    wait_for(lambda: last_step(run) > furthest, "a new step", HOUR)
    return time.time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--every", type=float, default=60.0, help="mean seconds of training between two kills")
    parser.add_argument("--steps", type=int, default=100_000, help="more than it can do meanwhile")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with cluster() as one, tempfile.TemporaryDirectory() as directory:
        one.env |= {"OMP_NUM_THREADS": "1", "CYCLEVAE_PYTHON": sys.executable, "CYCLEVAE_HOME": str(ROOT)}
        slurm, run = Slurm(one, Path(directory)), Path(directory) / "run"
        lengths = [f"training.num_train_steps={options.steps}", "logging.save_freq=50", "logging.eval_freq=1000"]
        job = slurm.sbatch("run", *lengths)
        slurm.reached("run", 1, job)
        began = time.time()
        for _ in range(options.kills):
            time.sleep(options.every * dice.uniform(0.5, 1.5))
            print(f"{kill_one(run, dice):.1f} s from the kill to the first new step", flush=True)
        time.sleep(options.every)
        hours = (time.time() - began) / HOUR
        slurm.cluster.run("scancel", job)
        slurm.wait(lambda: slurm.field(job, "JobState") in OVER, "the end", job)
        seconds = json.loads((run / "goodput.json").read_text())["seconds"]
    total = sum(seconds.values())
    for phase, spent in seconds.items():
        print(f"{phase:<17} {spent:7.1f} s {spent / total:6.1%}")
    print(f"goodput {seconds['productive'] / total:.1%} at {options.kills / hours:.0f} failures an hour")


if __name__ == "__main__":
    main()

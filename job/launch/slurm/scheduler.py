"""What SLURM's commands say: jobs in the queue, what became of those that left it, limits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from job.errors import JobError, UserError

OVER = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
}

COMPLETING = "COMPLETING"  # state of a job that is over but for its last processes


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue."""

    state: str  # PENDING, RUNNING, ...
    reason: str = ""  # why it waits, in SLURM's words
    start: str = ""  # when SLURM expects to start it, where it says so


def available() -> bool:
    """Whether this machine can talk to a SLURM cluster."""
    return shutil.which("sbatch") is not None


def output(*command: str) -> str:
    """Standard output of a command of SLURM. JobError with its own words when it fails, UserError without it."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    except FileNotFoundError as error:
        raise UserError(
            f"{command[0]} is not installed here: submit from a login node of the SLURM cluster; "
            "see docs: tutorials/sweep-on-slurm"
        ) from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise JobError(f"{command[0]}: {lines[-1].removeprefix(f'{command[0]}: ')}") from error
    except subprocess.TimeoutExpired as error:
        raise JobError(f"{command[0]}: no answer from the SLURM controller for {error.timeout:.0f} s") from error


def without_variables(names: Iterable[str] = ()) -> list[str]:
    """`env -u NAME ...`, to go before sbatch: these variables, and those of a job in which this program runs.

    sbatch would take them for the new job's, and its steps would ask for what that other job was given.
    """
    unset = [*(name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"), *names]
    return ["env", *(part for name in unset for part in ("-u", name))]


def queue() -> dict[str, QueuedJob]:
    """Every one of the user's jobs that has not ended, by id (`12`, or `12_3` of an array)."""
    jobs = {}
    for line in output("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%S|%r").splitlines():
        job, state, start, reason = line.split("|", 3)
        waits = state == "PENDING"
        if reason == "None":  # SLURM has not looked at it yet
            reason = ""
        jobs[job] = QueuedJob(state, reason if waits else "", start if waits and start != "N/A" else "")
    return jobs


def queued() -> dict[str, str]:
    """The states of these jobs."""
    return {job: entry.state for job, entry in queue().items()}


def ended(jobs: Iterable[str]) -> dict[str, tuple[str, str]]:
    """State and exit code (`1:0`) of jobs that accounting knows; empty where the cluster has no accounting."""
    try:
        lines = output(
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            "--format=JobID,State,ExitCode",
            "--jobs",
            ",".join(jobs),
        ).splitlines()
    except JobError:
        return {}
    fields = [line.split("|") for line in lines]
    return {job: (state.split()[0], code) for job, state, code in fields if state.split()[0] in OVER}


def max_array_size() -> int:
    """Most tasks that one job array may have."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", output("scontrol", "show", "config"))
    return max(1, int(found.group(1))) if found else 1001

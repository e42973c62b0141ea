"""What SLURM's commands say: jobs in the queue, what became of those that left it, limits."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable

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


def available() -> bool:
    """Whether this machine can talk to a SLURM cluster."""
    return shutil.which("sbatch") is not None


def output(*command: str) -> str:
    """Standard output of a command of SLURM. JobError with its own words when it fails, UserError without it."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not installed here: submit from a login node of the SLURM cluster") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise JobError(f"{command[0]}: {lines[-1].removeprefix(f'{command[0]}: ')}") from error
    except subprocess.TimeoutExpired as error:
        raise JobError(f"{command[0]}: no answer from the SLURM controller for {error.timeout:.0f} s") from error


def queued() -> dict[str, str]:
    """State of every one of the user's jobs that has not ended, by id (`12`, or `12_3` of an array)."""
    lines = output("squeue", "--me", "--noheader", "--array", "--format=%i|%T").split()
    return dict(line.split("|") for line in lines)


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

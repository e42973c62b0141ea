"""Whether a SLURM cluster can be submitted to from here."""

from __future__ import annotations

import shutil

from job.checks import Check, note, trouble, well
from job.errors import JobError
from job.launch.slurm import scheduler

NEEDED = ("sbatch", "squeue", "scancel", "scontrol", "srun")


def slurm_checks() -> list[Check]:
    """Tools, the controller, partitions, accounting, limits."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        remedy = "work on a login node of the cluster, or install slurm-client and its slurm.conf"
        return [trouble("SLURM's tools", f"{', '.join(missing)} not found", remedy)]
    checks = [well("SLURM's tools", ", ".join(NEEDED))]
    try:
        waiting = scheduler.queue()
    except JobError as error:
        remedy = "look at SLURM_CONF, munge and slurmctld: `scontrol ping`"
        return [*checks, trouble("controller", str(error), remedy)]
    checks.append(well("controller", f"answers; {len(waiting)} jobs of yours in the queue"))
    checks.append(partition_check())
    checks.append(accounting_check())
    checks.append(well("arrays", f"{scheduler.max_array_size()} points of a sweep in one job array"))
    return checks


def partition_check() -> Check:
    """Whether a partition takes jobs, and what GPUs its nodes have."""
    try:
        lines = scheduler.output("sinfo", "--noheader", "--format=%P|%a|%D|%G|%l").splitlines()
    except JobError as error:
        return trouble("partitions", str(error), "`sinfo` tells what is known of the nodes")
    up = [line.split("|") for line in lines if line.split("|")[1] == "up"]
    if not up:
        return trouble("partitions", "none is up", "wait for the administrators, or choose another cluster")
    told = [f"{name} ({nodes} nodes, GPUs: {gpus}, limit {limit})" for name, _, nodes, gpus, limit in up]
    return well("partitions", "; ".join(told))


def accounting_check() -> Check:
    """Whether sacct tells how jobs ended; the run's own files do where it does not."""
    try:
        scheduler.output("sacct", "--noheader", "--allocations", "--format=JobID")
    except JobError as error:
        words = f"{error}; how a job ended is then known from its run directory alone"
        return note("accounting", words, "nothing is needed; slurmdbd would tell of jobs that never started")
    return well("accounting", "sacct answers")

"""Names that the launcher, its manifests and the pods agree on."""

from __future__ import annotations

import hashlib
import os.path
import re
from pathlib import Path
from typing import Any

from job.errors import UserError

Object = dict[str, Any]  # of Kubernetes, as its YAML has it

LABELS = {"app.kubernetes.io/name": "cyclevae"}  # of jobs and pods
SWEEP_LABEL = "cyclevae/sweep"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

RUN_ANNOTATION = "cyclevae/run"  # run directory in the pods
OVERRIDES_ANNOTATION = "cyclevae/overrides"  # what sets the run apart, in words
DIGEST_ANNOTATION = "cyclevae/manifest"  # of the spec that was sent: tells a job of other settings from the same
STOP_ANNOTATION = "cyclevae/stop-seconds"
CANCELLED_ANNOTATION = "cyclevae/cancelled"  # what was known of the run's progress when it was cancelled, as JSON

# Where pods have the claims. Their working directory is /: runs/NAME and data/NAME mean the same there and here.
RUNS_MOUNT = "/runs"
DATA_MOUNT = "/data"
SCRATCH_MOUNT = "/tmp"  # on the node's disk, and gone with the pod
WRITABLE_MOUNTS = (SCRATCH_MOUNT, DATA_MOUNT, RUNS_MOUNT)

METRICS_PORT = 9400  # of a pod's first rank; the others count up from it
METRICS_PORT_NAME = "metrics-{rank}"
POD_INDEX_VARIABLE = "CYCLEVAE_POD_INDEX"  # number of the pod among those of the job
# Of a TrainJob that says nothing of its run but these.
JOB_NAME_VARIABLE = "CYCLEVAE_JOB"
ARGUMENTS_VARIABLE = "CYCLEVAE_ARGUMENTS"
PREPARE_VARIABLE = "CYCLEVAE_PREPARE"

LONGEST_NAME = 50  # the operator names pods and services NAME-worker-123, in at most 63 characters
DIGEST_LENGTH = 8


def job_name(run_dir: Path) -> str:
    """Name of a run directory's job: a DNS label that begins with a letter.

    It is the directory's own name where that is one. Otherwise a digest tells directories apart that differ only in
    what a label cannot have.
    """
    text = str(run_dir.relative_to(RUNS_MOUNT))
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"run-{label}".rstrip("-")
    if label == text and len(label) <= LONGEST_NAME:
        return label
    digest = hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]
    return f"{label[: LONGEST_NAME - DIGEST_LENGTH - 1].rstrip('-')}-{digest}"


def named_job(word: str) -> str:
    """The job that a word of the command line means: its own name, or the directory of its run or sweep.

    People know runs by their directories, as on SLURM; a job's name is a label and has no slash. UserError for a
    directory that no run can have.
    """
    if "/" not in word:
        return word
    run_dir = Path(os.path.normpath(Path("/", word)))
    if not run_dir.is_relative_to(RUNS_MOUNT) or str(run_dir) == RUNS_MOUNT:
        raise UserError(f"{word}: pods have runs below {RUNS_MOUNT}; give runs/NAME, or a job's name")
    return job_name(run_dir)

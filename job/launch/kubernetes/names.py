"""Names that the launcher, its manifests and the pods agree on."""

from __future__ import annotations

from typing import Any

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

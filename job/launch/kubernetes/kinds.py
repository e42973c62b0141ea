"""The kinds of job that train a run: a TrainJob of Kubeflow Trainer 2, and a PyTorchJob of the training operator 1.9.

Everything in which they differ once they are on the cluster is here; how they are written is in manifests.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from job.errors import UserError
from job.launch.kubernetes.names import CANCELLED_ANNOTATION, QUEUE_LABEL, Object

OVER = ("COMPLETED", "FAILED", "SUSPENDED", "DELETED")


@dataclass(frozen=True)
class Kind:
    """A kind of job: where the server keeps such objects, and how their pods are known."""

    name: str
    group: str
    version: str
    plural: str
    word: str  # of it in hydra.launcher.kind
    job_label: str  # that the operator gives to the pods of a job: the job's name
    index_label: str  # the pod's number among those of the job
    container: str  # in which ranks run
    needs: str  # what has to be installed

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}"

    @property
    def where(self) -> dict[str, str]:
        """The arguments by which the client finds such objects."""
        return {"group": self.group, "version": self.version, "plural": self.plural}


TRAIN_JOB = Kind(
    name="TrainJob",
    group="trainer.kubeflow.org",
    version="v1alpha1",
    plural="trainjobs",
    word="trainjob",
    job_label="jobset.sigs.k8s.io/jobset-name",
    index_label="batch.kubernetes.io/job-completion-index",
    container="node",
    needs="Kubeflow Trainer 2",
)
PYTORCH_JOB = Kind(
    name="PyTorchJob",
    group="kubeflow.org",
    version="v1",
    plural="pytorchjobs",
    word="pytorchjob",
    job_label="training.kubeflow.org/job-name",
    index_label="training.kubeflow.org/replica-index",
    container="pytorch",
    needs="Kubeflow's training operator 1.9",
)
KINDS = (TRAIN_JOB, PYTORCH_JOB)  # the first that a cluster serves is taken where nothing else is said


def kind_of(job: Object) -> Kind:
    """The kind of a job."""
    return next(kind for kind in KINDS if kind.name == job["kind"])


def kind_called(word: str) -> Kind:
    """The kind that hydra.launcher.kind names. UserError for another word."""
    for kind in KINDS:
        if kind.word == word:
            return kind
    words = ", ".join(kind.word for kind in KINDS)
    raise UserError(f"hydra.launcher.kind={word}: choose one of auto, {words}")


def suspension(kind: Kind, suspended: bool) -> Object:
    """The change that ends a job's pods, or starts them again."""
    if kind is TRAIN_JOB:
        return {"spec": {"suspend": suspended}}
    return {"spec": {"runPolicy": {"suspend": suspended}}}


def is_suspended(job: Object) -> bool:
    """Whether a job is told to have no pods."""
    spec = job["spec"] if kind_of(job) is TRAIN_JOB else job["spec"]["runPolicy"]
    return bool(spec.get("suspend"))


def is_queued(job: Object) -> bool:
    """Whether Kueue decides when a job runs."""
    return QUEUE_LABEL in (job["metadata"].get("labels") or {})


def annotation(job: Object, name: str) -> str | None:
    """An annotation of a job, None without it."""
    value = (job["metadata"].get("annotations") or {}).get(name)
    return value if value is None else str(value)


def pod_index(pod: Any) -> int:
    """The number of a pod among those of its job."""
    known = {**(pod.metadata.annotations or {}), **(pod.metadata.labels or {})}
    return next((int(known[kind.index_label]) for kind in KINDS if kind.index_label in known), 0)


def state(job: Object) -> str:
    """PENDING, QUEUED (by Kueue), RUNNING, RESTARTING, SUSPENDED (by cancel), COMPLETED or FAILED."""
    true = {one["type"] for one in conditions(job) if one["status"] == "True"}
    if true & {"Succeeded", "Complete"}:
        return "COMPLETED"
    if "Failed" in true:
        return "FAILED"
    if is_suspended(job):
        # A job in a queue is suspended until Kueue lets it run, and after cancel.
        return "QUEUED" if is_queued(job) and annotation(job, CANCELLED_ANNOTATION) is None else "SUSPENDED"
    if kind_of(job) is TRAIN_JOB:
        return _state_of_nodes(job)
    if "Restarting" in true:
        return "RESTARTING"
    return "RUNNING" if "Running" in true else "PENDING"


def _state_of_nodes(job: Object) -> str:
    """A TrainJob has no condition that says that it runs; the numbers of its pods do."""
    nodes: Object = next((one for one in job.get("status", {}).get("jobsStatus") or [] if one["name"] == "node"), {})
    if nodes.get("ready") or nodes.get("active"):
        return "RUNNING"
    return "RESTARTING" if nodes.get("failed") else "PENDING"


def conditions(job: Object) -> list[Object]:
    """A job's conditions; none before its operator has seen it."""
    return list(job.get("status", {}).get("conditions") or [])

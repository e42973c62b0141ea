"""What a run asks of the cluster: the keys of hydra.launcher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from job.errors import UserError

# What Trainer 2.3 lets a TrainJob change of the pods that its runtime describes, by a runtimePatch.
PATCHABLE = {
    "affinity",
    "imagePullSecrets",
    "nodeSelector",
    "schedulingGates",
    "securityContext",
    "serviceAccountName",
    "terminationGracePeriodSeconds",
    "tolerations",
    "volumes",
}
OF_THE_RUNTIME = ("priority_class", "start_min", "fs_group")  # settings that a TrainJob cannot change
OF_ITS_RUNTIME = (
    "a TrainJob takes it from its TrainingRuntime; change it in k8s/runtime, or set hydra.launcher.kind=pytorchjob"
)


@dataclass
class ContainerSettings:
    image: str | None = None  # null: that of the TrainingRuntime, for a TrainJob
    pull_policy: str | None = None  # null: IfNotPresent, Always for :latest
    pull_secrets: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)  # variables set for the ranks
    # Variables from Secrets of the namespace: the name of one, or NAME/KEY where its key is not the variable's name.
    secrets: dict[str, str] = field(default_factory=dict)


@dataclass
class Settings:
    """What a run asks of the cluster. The names are those of hydra/launcher=slurm where they mean the same."""

    kind: str = "auto"  # trainjob, pytorchjob; auto: TrainJob where the cluster knows it, else PyTorchJob
    runtime: str = "cyclevae"  # of TrainJobs: the TrainingRuntime that k8s/runtime installs
    nodes: int = 1
    min_nodes: int | None = None  # train on this many while others are missing; null: on all nodes or not at all
    gpus_per_node: int | None = None
    gpu_resource: str = "nvidia.com/gpu"
    tasks_per_node: int | None = None  # null: one per GPU
    cpus_per_task: int | None = None
    mem_gb: int | None = None  # of a node, shm_gb included
    shm_gb: int = 2
    resources: dict[str, int] = field(default_factory=dict)  # others of a node, such as {rdma/ib: 1}
    container: ContainerSettings = field(default_factory=ContainerSettings)
    runs_claim: str = "runs"
    data_claim: str | None = "data"  # null: pods have an empty directory of their own in its place
    # Arguments of job.prepare, run before training; a finished dataset is left as it is.
    prepare: list[str] = field(default_factory=list)
    queue: str | None = None  # Kueue's LocalQueue
    priority_class: str | None = None
    service_account: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[Any] = field(default_factory=list)
    unreachable_seconds: int = 60  # until pods of a node that does not answer are given up (Kubernetes: 300)
    fs_group: int | None = 1000  # group that may write the claims; null where the cluster chooses one (OpenShift)
    max_restarts: int = 5  # restarts in a row without a new checkpoint, after which the job fails
    deadline_min: int | None = None  # minutes after which the job is ended for good
    start_min: int = 30  # minutes that preparation of data, image and start may take
    stop_seconds: int = 180  # one step and one save must fit
    pod: dict[str, Any] = field(default_factory=dict)  # anything else, merged into the pod's spec

    @property
    def tasks(self) -> int:
        """Ranks of a node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def several_nodes(self) -> bool:
        return self.nodes > 1

    @property
    def elastic(self) -> bool:
        """Whether a run may train while nodes are missing."""
        return self.min_nodes is not None and self.min_nodes < self.nodes

    @property
    def all_tolerations(self) -> list[Any]:
        """The user's tolerations, and how long a node may be away before its pods are given up."""
        keys = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
        toleration = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": self.unreachable_seconds}
        return [*self.tolerations, *({"key": key, **toleration} for key in keys)]

    @property
    def torchrun_seconds(self) -> int:
        """How long torchrun waits for its workers after SIGTERM, before it kills them."""
        return self.stop_seconds + 30

    @property
    def grace_seconds(self) -> int:
        """How long Kubernetes waits for the pod after SIGTERM, before it kills it."""
        return self.torchrun_seconds + 30

    def refuse_impossible(self) -> None:
        """UserError for settings that no cluster could take."""
        if self.min_nodes is not None and not 1 <= self.min_nodes <= self.nodes:
            raise UserError(
                f"hydra.launcher.min_nodes={self.min_nodes}: give a number from 1 to hydra.launcher.nodes={self.nodes}"
            )
        lowest = {
            "nodes": 1,
            "tasks": 1,
            "max_restarts": 0,
            "stop_seconds": 1,
            "start_min": 1,
            "unreachable_seconds": 1,
        }
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise UserError(f"hydra.launcher.{name}={getattr(self, name)}: give a positive number")
        for name, secret in self.container.secrets.items():
            if name in self.container.env:
                raise UserError(
                    f"hydra.launcher.container.secrets.{name} and hydra.launcher.container.env.{name} "
                    "set one variable; leave one out"
                )
            if secret.count("/") > 1 or not secret.partition("/")[0]:
                raise UserError(
                    f"hydra.launcher.container.secrets.{name}={secret}: "
                    "give a Secret of the namespace, NAME or NAME/KEY"
                )

    def refuse_for_pytorch_job(self) -> None:
        """UserError for what a PyTorchJob lacks or cannot take."""
        self.refuse_impossible()
        if not self.container.image:
            raise UserError("hydra.launcher.container.image is not set: give the image that holds this program")

    def refuse_for_train_job(self) -> None:
        """UserError for what a TrainJob cannot take: much of its pods is its TrainingRuntime's."""
        self.refuse_impossible()
        if self.elastic:
            raise UserError(
                f"hydra.launcher.min_nodes={self.min_nodes} needs hydra.launcher.kind=pytorchjob: a TrainJob trains on "
                "all of its nodes or not at all"
            )
        defaults = Settings()
        for name in OF_THE_RUNTIME:
            if getattr(self, name) != getattr(defaults, name):
                raise UserError(f"hydra.launcher.{name}={getattr(self, name)}: {OF_ITS_RUNTIME}")
        if self.container.pull_policy:
            raise UserError(f"hydra.launcher.container.pull_policy={self.container.pull_policy}: {OF_ITS_RUNTIME}")
        if self.data_claim is None:
            # Trainer merges volumes by their names: this one would be a claim and an empty directory at once.
            raise UserError(f"hydra.launcher.data_claim=null: {OF_ITS_RUNTIME}")
        unknown = sorted(self.pod.keys() - PATCHABLE)
        if unknown:
            raise UserError(f"hydra.launcher.pod.{unknown[0]}: {OF_ITS_RUNTIME}")

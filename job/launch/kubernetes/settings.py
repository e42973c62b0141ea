"""What a run asks of the cluster: the keys of hydra.launcher for hydra/launcher=pytorchjob."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from job.errors import UserError


@dataclass
class ContainerSettings:
    image: str | None = None
    pull_policy: str | None = None  # null: IfNotPresent, Always for :latest
    pull_secrets: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)  # variables set for the ranks


@dataclass
class Settings:
    """What a run asks of the cluster. The names are those of hydra/launcher=slurm where they mean the same."""

    nodes: int = 1
    min_nodes: int | None = None  # train on this many while others are missing; null: on all nodes or not at all
    gpus_per_node: int | None = None
    gpu_resource: str = "nvidia.com/gpu"
    tasks_per_node: int | None = None  # null: one per GPU
    cpus_per_task: int | None = None
    mem_gb: int | None = None  # of a node, shm_gb included
    shm_gb: int = 2
    container: ContainerSettings = field(default_factory=ContainerSettings)
    runs_claim: str = "runs"
    data_claim: str = "data"
    # Arguments of job.prepare, run before training; a finished dataset is left as it is.
    prepare: list[str] = field(default_factory=list)
    queue: str | None = None  # Kueue's LocalQueue
    priority_class: str | None = None
    service_account: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[Any] = field(default_factory=list)
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
    def torchrun_seconds(self) -> int:
        """How long torchrun waits for its workers after SIGTERM, before it kills them."""
        return self.stop_seconds + 30

    @property
    def grace_seconds(self) -> int:
        """How long Kubernetes waits for the pod after SIGTERM, before it kills it."""
        return self.torchrun_seconds + 30

    def refuse_impossible(self) -> None:
        """UserError for settings that no cluster could take."""
        if not self.container.image:
            raise UserError("hydra.launcher.container.image is not set: give the image that holds this program")
        if self.min_nodes is not None and not 1 <= self.min_nodes <= self.nodes:
            raise UserError(
                f"hydra.launcher.min_nodes={self.min_nodes}: give a number from 1 to hydra.launcher.nodes={self.nodes}"
            )
        lowest = {"nodes": 1, "tasks": 1, "max_restarts": 0, "stop_seconds": 1, "start_min": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise UserError(f"hydra.launcher.{name}={getattr(self, name)}: give a positive number")

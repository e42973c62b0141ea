"""The objects that train a run on Kubernetes: a PyTorchJob (training operator 1.9), or a runtime and a TrainJob (Trainer v2), from the same settings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from job.errors import ExitCode, UserError

Object = dict[str, Any]
PORT = 9400  # metrics of a pod's first rank; the others count up from it
NAME = "app.kubernetes.io/name"
LABELS = {NAME: "cyclevae"}
SWEEP, RUN, OVERRIDES, DIGEST, STOP = (
    f"cyclevae/{name}" for name in ("sweep", "run", "overrides", "manifest", "stop-seconds")
)
QUEUE = "kueue.x-k8s.io/queue-name"
RUNS, DATA = (
    "/runs",
    "/data",
)  # where the claims are mounted; the working directory is /, so that runs/NAME and data/NAME mean the same here and there
RENDEZVOUS_PORT = 23456


@dataclass
class Container:
    image: str | None = None
    pull_policy: str | None = None  # null: IfNotPresent, Always for :latest
    pull_secrets: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)  # variables set for the ranks


@dataclass
class Settings:
    """What a run asks of the cluster. The names are those of hydra/launcher=slurm where they mean the same."""

    nodes: int = 1
    min_nodes: int | None = (
        None  # train on this many while others are missing (elastic); null: on all nodes or not at all
    )
    gpus_per_node: int | None = None
    gpu_resource: str = "nvidia.com/gpu"
    tasks_per_node: int | None = None  # null: one per GPU
    cpus_per_task: int | None = None
    mem_gb: int | None = None  # of a node, shm_gb included
    shm_gb: int = 2
    container: Container = field(default_factory=Container)
    runs_claim: str = "runs"
    data_claim: str = "data"
    prepare: list[str] = field(
        default_factory=list
    )  # arguments of job.prepare, run before training; a finished dataset is left as it is
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
        return self.tasks_per_node or self.gpus_per_node or 1

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
        for name in ("nodes", "tasks", "max_restarts", "stop_seconds", "start_min"):
            if getattr(self, name) < (name != "max_restarts"):
                raise UserError(f"hydra.launcher.{name}={getattr(self, name)}: give a positive number")


@dataclass(frozen=True)
class Run:
    """A run to be trained by one job."""

    name: str  # of the job: a DNS label
    directory: str  # on the claim of runs
    arguments: list[str]  # of job.train
    port: int | None = PORT  # monitoring.port; None: no metrics
    overrides: str = ""  # in words, what sets it apart
    sweep: str = ""


def pytorch_job(run: Run, settings: Settings) -> Object:
    """The PyTorchJob of a run.

    One node is a Master alone. Several are Workers alone, which find each other through torchrun's c10d rendezvous: the operator gives Workers
    beside a Master an init container that a namespace with restricted pod security refuses.
    """
    settings.refuse_impossible()
    several = settings.nodes > 1
    command = [*entry(run, settings), *([] if several else ["--standalone"]), "-m", "job.train", *run.arguments]
    environment = [from_field("CYCLEVAE_POD_INDEX", "metadata.labels['training.kubeflow.org/replica-index']")]
    if (
        several
    ):  # addresses need no DNS; with a store shared between rendezvous, ranks never start again after a node has joined
        environment += [
            from_field("PET_LOCAL_ADDR", "status.podIP"),
            {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"},
        ]
    template = pod(run, settings, "pytorch", command, environment, "training.kubeflow.org/job-name", gated=not several)
    policy: Object = {
        "cleanPodPolicy": "Running",
        "backoffLimit": max(1, settings.max_restarts),
        "suspend": settings.queue is not None,
    }
    if settings.deadline_min is not None:
        policy["activeDeadlineSeconds"] = 60 * settings.deadline_min
    spec: Object = {"runPolicy": policy, "nprocPerNode": str(settings.tasks)}
    if several:
        spec["elasticPolicy"] = {
            "rdzvBackend": "c10d",
            "rdzvId": run.name,
            "minReplicas": settings.min_nodes or settings.nodes,
            "maxReplicas": settings.nodes,
            "maxRestarts": 0,
            "rdzvConf": [{"key": "join_timeout", "value": str(60 * settings.start_min)}],
        }
    spec["pytorchReplicaSpecs"] = {
        "Worker" if several else "Master": {
            "replicas": settings.nodes,
            "restartPolicy": "ExitCode",
            "template": template,
        }
    }
    return _object("kubeflow.org/v1", "PyTorchJob", run, settings, spec)


def train_job(run: Run, settings: Settings) -> list[Object]:
    """A TrainingRuntime with the pods of a run, and the TrainJob that runs them. (A ClusterTrainingRuntime has the same spec, and needs an administrator.)"""
    settings.refuse_impossible()
    command = [*entry(run, settings), "-m", "job.train", *run.arguments]
    index = from_field("CYCLEVAE_POD_INDEX", "metadata.annotations['batch.kubernetes.io/job-completion-index']")
    template = pod(run, settings, "node", command, [index], "jobset.sigs.k8s.io/jobset-name", gated=True)
    template["spec"]["restartPolicy"] = "Never"
    for_good, again = [ExitCode.FAILED, ExitCode.USAGE], [ExitCode.RETRY, ExitCode.STOPPED]
    job_spec = {
        "backoffLimit": settings.max_restarts,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "node",
                        "operator": "In",
                        "values": [int(code) for code in for_good],
                    },
                },
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "Ignore",
                    "onExitCodes": {"containerName": "node", "operator": "In", "values": [int(code) for code in again]},
                },
            ]
        },
        "template": template,
    }
    replicated = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": job_spec,
        },
    }
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {"name": run.name, "labels": LABELS},
        "spec": {
            "mlPolicy": {"numNodes": settings.nodes, "torch": {}},
            "template": {"spec": {"network": {"publishNotReadyAddresses": True}, "replicatedJobs": [replicated]}},
        },
    }
    spec: Object = {
        "runtimeRef": {"kind": "TrainingRuntime", "name": run.name},
        "suspend": settings.queue is not None,
        "trainer": {"numNodes": settings.nodes, "numProcPerNode": settings.tasks},
    }
    if settings.deadline_min is not None:
        spec["activeDeadlineSeconds"] = 60 * settings.deadline_min
    return [runtime, _object("trainer.kubeflow.org/v1alpha1", "TrainJob", run, settings, spec)]


def entry(run: Run, settings: Settings) -> list[str]:
    """The head of a container's command; the arguments of torchrun follow."""
    return [
        "tini",
        "--",
        "python",
        "-m",
        "job.launch.kubernetes.attempt",
        run.directory,
        str(settings.max_restarts),
        *settings.prepare,
        "--",
    ]


def pod(
    run: Run, settings: Settings, name: str, command: list[str], environment: list[Object], job_label: str, gated: bool
) -> Object:
    """Template of a node's pod. `gated`: it may count as ready only when it trains (nothing looks it up by name before)."""
    trainer = {
        "name": name,
        **_image(settings),
        "command": command,
        "workingDir": "/",
        **_ports(run, settings),
        "env": [*_variables(settings), *environment],
        "resources": _resources(settings),
        **(probes(settings, gated) if run.port else {}),
        "securityContext": SECURITY,
        "volumeMounts": [*_MOUNTS, {"name": "data", "mountPath": DATA, "readOnly": not settings.prepare}],
    }
    spec: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
            **(
                {"fsGroup": settings.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
                if settings.fs_group is not None
                else {}
            ),
        },
        "containers": [trainer],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": settings.runs_claim}},
            {"name": "data", "persistentVolumeClaim": {"claimName": settings.data_claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{settings.shm_gb}Gi"}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    if settings.nodes > 1:
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {job_label: run.name}},
            }
        ]
    optional = {
        "priorityClassName": settings.priority_class,
        "serviceAccountName": settings.service_account,
        "nodeSelector": settings.node_selector,
        "tolerations": settings.tolerations,
        "imagePullSecrets": [{"name": secret} for secret in settings.container.pull_secrets],
    }
    spec |= {key: value for key, value in optional.items() if value}
    return {"metadata": {"labels": LABELS}, "spec": merged(spec, settings.pod)}


SECURITY = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
_MOUNTS = [
    {"name": "runs", "mountPath": RUNS},
    {"name": "shm", "mountPath": "/dev/shm"},
    {"name": "tmp", "mountPath": "/tmp"},
]


def probes(settings: Settings, gated: bool) -> Object:
    """Liveness fails when steps stall; by itself a hung run ends after training.sick_rank_timeout_seconds (300) and names the rank, so Kubernetes
    acts later. A probe that keeps pods from being ready would keep the operator's DNS names of Workers away, without which they cannot start."""

    def check(path: str, period: int, failures: int) -> Object:
        return {
            "httpGet": {"path": path, "port": "metrics-0"},
            "periodSeconds": period,
            "failureThreshold": failures,
            "timeoutSeconds": 5,
        }

    liveness = check("/healthz", 30, 12)
    if not gated:
        return {"livenessProbe": {**liveness, "initialDelaySeconds": 60 * settings.start_min}}
    return {
        "startupProbe": check("/healthz", 10, 6 * settings.start_min),
        "readinessProbe": check("/readyz", 10, 3),
        "livenessProbe": liveness,
    }


def from_field(name: str, path: str) -> Object:
    """A variable with what the pod knows of itself."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _image(settings: Settings) -> Object:
    return {
        "image": settings.container.image,
        **({"imagePullPolicy": settings.container.pull_policy} if settings.container.pull_policy else {}),
    }


def _variables(settings: Settings) -> list[Object]:
    threads = {"OMP_NUM_THREADS": str(settings.cpus_per_task)} if settings.cpus_per_task else {}
    # A user id without a name has no home either.
    values = {
        "HOME": "/tmp",
        "USER": "cyclevae",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(settings.torchrun_seconds),
        **threads,
        **settings.container.env,
    }
    return [{"name": name, "value": str(value)} for name, value in values.items()]


def _resources(settings: Settings) -> Object:
    """Memory and GPUs as limits; processors are only requested, since a limit would throttle the loader."""
    cpu = {"cpu": str(settings.cpus_per_task * settings.tasks)} if settings.cpus_per_task else {}
    memory = {"memory": f"{settings.mem_gb}Gi"} if settings.mem_gb else {}
    gpu = {settings.gpu_resource: str(settings.gpus_per_node)} if settings.gpus_per_node else {}
    return {
        key: value for key, value in (("requests", {**cpu, **memory, **gpu}), ("limits", {**memory, **gpu})) if value
    }


def _ports(run: Run, settings: Settings) -> Object:
    rendezvous = {"name": "pytorchjob-port", "containerPort": RENDEZVOUS_PORT}
    metrics = (
        [{"name": f"metrics-{rank}", "containerPort": run.port + rank} for rank in range(settings.tasks)]
        if run.port
        else []
    )
    return {"ports": [rendezvous, *metrics]}


def _object(api_version: str, kind: str, run: Run, settings: Settings, spec: Object) -> Object:
    labels = {
        **LABELS,
        **({SWEEP: run.sweep} if run.sweep else {}),
        **({QUEUE: settings.queue} if settings.queue else {}),
    }
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    annotations = {RUN: run.directory, OVERRIDES: run.overrides, DIGEST: digest, STOP: str(settings.stop_seconds)}
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": run.name,
            "labels": labels,
            "annotations": {key: value for key, value in annotations.items() if value},
        },
        "spec": spec,
    }


def merged(base: Any, change: Any) -> Any:
    """`base` with the values of `change`: objects are merged, all else is replaced."""
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    return {**base, **{key: merged(base.get(key), value) for key, value in change.items()}}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write what occurs twice twice: people read these files."""
        return True


def to_yaml(objects: list[Object]) -> str:
    """The objects as one stream of YAML."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=160, allow_unicode=True)

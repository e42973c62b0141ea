"""The pods that train a run: one per node, the same for every kind of job that makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from job.launch.kubernetes.kinds import Kind
from job.launch.kubernetes.names import (
    DATA_MOUNT,
    LABELS,
    METRICS_PORT,
    METRICS_PORT_NAME,
    RUNS_MOUNT,
    SCRATCH_MOUNT,
    Object,
)
from job.launch.kubernetes.settings import Settings

RENDEZVOUS_PORT = 23456
# The namespace of k8s/base enforces restricted pod security, which asks for all of this.
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@dataclass(frozen=True)
class LaunchedRun:
    """A run as the cluster sees it: trained by one job."""

    name: str  # of the job: a DNS label
    directory: str  # on the claim of runs
    arguments: list[str]  # of job.train
    port: int | None = METRICS_PORT  # monitoring.port; None: no metrics
    overrides: str = ""  # in words, what sets it apart
    sweep: str = ""
    copies_data: bool = False  # from a store, to where the claim of the data is


@dataclass(frozen=True)
class PodKind:
    """What differs between the pods of a PyTorchJob and those of a TrainJob."""

    job: Kind
    torchrun_options: list[str] = field(default_factory=list)
    environment: list[Object] = field(default_factory=list)
    gated: bool = True  # may count as ready only when it trains (nothing looks it up by name before)


def present(values: Mapping[str, Any]) -> Object:
    """The fields that have a value: None leaves a field out."""
    return {name: value for name, value in values.items() if value is not None}


def pod_template(run: LaunchedRun, settings: Settings, kind: PodKind) -> Object:
    """Template of a node's pod."""
    spec = present(
        {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": settings.grace_seconds,
            "securityContext": _pod_security(settings),
            "containers": [_trainer(run, settings, kind)],
            "volumes": volumes(settings),
            "topologySpreadConstraints": _spread(run, kind) if settings.several_nodes else None,
            "priorityClassName": settings.priority_class or None,
            "serviceAccountName": settings.service_account or None,
            "nodeSelector": settings.node_selector or None,
            "tolerations": settings.all_tolerations,
            "imagePullSecrets": [{"name": secret} for secret in settings.container.pull_secrets] or None,
        }
    )
    return {"metadata": {"labels": LABELS}, "spec": merged(spec, settings.pod)}


def _pod_security(settings: Settings) -> Object:
    return present(
        {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
            "fsGroup": settings.fs_group,
            # Without it the kubelet changes the group of every file on the claim whenever a pod starts.
            "fsGroupChangePolicy": "OnRootMismatch" if settings.fs_group is not None else None,
        }
    )


def volumes(settings: Settings) -> list[Object]:
    data: Object = {"emptyDir": {}}
    if settings.data_claim is not None:
        data = {"persistentVolumeClaim": {"claimName": settings.data_claim}}
    return [
        {"name": "runs", "persistentVolumeClaim": {"claimName": settings.runs_claim}},
        {"name": "data", **data},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{settings.shm_gb}Gi"}},
        {"name": "tmp", "emptyDir": {}},
    ]


def _spread(run: LaunchedRun, kind: PodKind) -> list[Object]:
    """Rather one pod on each node than two on one, but no reason to wait."""
    return [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {kind.job.job_label: run.name}},
        }
    ]


def _trainer(run: LaunchedRun, settings: Settings, kind: PodKind) -> Object:
    """The container of a pod."""
    container = present(
        {
            "name": kind.job.container,
            "image": settings.container.image,
            "imagePullPolicy": settings.container.pull_policy or None,
            "command": command(run, settings, kind.torchrun_options),
            "workingDir": "/",
            "ports": _ports(run, settings),
            "env": [*variables(settings), *kind.environment],
            "resources": resources(settings),
        }
    )
    if run.port:
        container |= _probes(settings, kind.gated)
    return container | {"securityContext": RESTRICTED, "volumeMounts": _mounts(run, settings)}


# tini, as the first process of a container must collect orphans and pass signals on; then attempt.py
ATTEMPT = ["tini", "--", "python", "-m", "job.launch.kubernetes.attempt"]


def command(run: LaunchedRun, settings: Settings, torchrun_options: list[str]) -> list[str]:
    """What a pod does: attempt.py, which prepares data and becomes torchrun, which starts the run."""
    how = [run.directory, str(settings.max_restarts), *settings.prepare]
    return [*ATTEMPT, *how, "--", *torchrun_options, "-m", "job.train", *run.arguments]


def _ports(run: LaunchedRun, settings: Settings) -> list[Object]:
    ports: list[Object] = [{"name": "pytorchjob-port", "containerPort": RENDEZVOUS_PORT}]
    if run.port:
        ports += [_metrics_port(rank, run.port) for rank in range(settings.tasks)]
    return ports


def _metrics_port(rank: int, first: int) -> Object:
    return {"name": METRICS_PORT_NAME.format(rank=rank), "containerPort": first + rank}


def variables(settings: Settings) -> list[Object]:
    """Variables of the ranks; those of the user win."""
    values = present(
        {
            # A user id without a name has no home either, and libraries write caches there.
            "HOME": SCRATCH_MOUNT,
            "USER": "cyclevae",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": settings.torchrun_seconds,
            "OMP_NUM_THREADS": settings.cpus_per_task or None,
        }
    )
    given = values | settings.container.env
    plain: list[Object] = [{"name": name, "value": str(value)} for name, value in given.items()]
    return plain + [_from_secret(name, secret) for name, secret in settings.container.secrets.items()]


def _from_secret(variable: str, secret: str) -> Object:
    """A variable whose value is in a Secret: NAME, under the variable's own name, or NAME/KEY."""
    name, _, key = secret.partition("/")
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key or variable}}}


def resources(settings: Settings) -> Object:
    """Memory, GPUs and other devices as limits; processors are only requested: a limit would throttle the loader."""
    limits = {}
    if settings.mem_gb:
        limits["memory"] = f"{settings.mem_gb}Gi"
    if settings.gpus_per_node:
        limits[settings.gpu_resource] = str(settings.gpus_per_node)
    limits |= {name: str(number) for name, number in settings.resources.items()}
    processors = {"cpu": str(settings.cpus_per_task * settings.tasks)} if settings.cpus_per_task else {}
    return present({"requests": (processors | limits) or None, "limits": limits or None})


def _mounts(run: LaunchedRun, settings: Settings) -> list[Object]:
    writes_data = bool(settings.prepare) or run.copies_data
    return [
        {"name": "runs", "mountPath": RUNS_MOUNT},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "tmp", "mountPath": SCRATCH_MOUNT},
        {"name": "data", "mountPath": DATA_MOUNT, "readOnly": not writes_data},
    ]


def _probes(settings: Settings, gated: bool) -> Object:
    """When Kubernetes takes a pod for ready, and when for dead.

    A run that hangs ends by itself after training.sick_rank_timeout_seconds (300) and names the rank. So liveness fails
    later than that, after six minutes. Pods of several nodes (not `gated`) have no probe that keeps them from being
    ready: the cluster's DNS has the names of ready pods alone, and by these names the pods must find each other first.
    """
    failures_in_six_minutes = 12
    liveness = _check("/healthz", 30, failures_in_six_minutes)
    if not gated:
        return {"livenessProbe": liveness | {"initialDelaySeconds": 60 * settings.start_min}}
    return {
        "startupProbe": _check("/healthz", 10, 6 * settings.start_min),
        "readinessProbe": _check("/readyz", 10, 3),
        "livenessProbe": liveness,
    }


def _check(path: str, period: int, failures: int) -> Object:
    """A probe of the first rank's endpoint every `period` seconds, which fails at so many failures in a row."""
    return {
        "httpGet": {"path": path, "port": METRICS_PORT_NAME.format(rank=0)},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": 5,
    }


def from_field(name: str, path: str) -> Object:
    """A variable with what the pod knows of itself."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def merged(base: Any, change: Any) -> Any:
    """`base` with the values of `change`: objects are merged, all else is replaced."""
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    return {**base, **{key: merged(base.get(key), value) for key, value in change.items()}}

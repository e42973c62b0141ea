"""The objects that train a run on Kubernetes, from the same settings.

A PyTorchJob for Kubeflow's training operator 1.9, or a TrainingRuntime and a TrainJob for Kubeflow Trainer v2.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import yaml

from job.errors import ExitCode
from job.launch.kubernetes.names import (
    DIGEST_ANNOTATION,
    INDEX_OF_POD_LABEL,
    JOB_OF_POD_LABEL,
    LABELS,
    OVERRIDES_ANNOTATION,
    POD_INDEX_VARIABLE,
    QUEUE_LABEL,
    RUN_ANNOTATION,
    STOP_ANNOTATION,
    SWEEP_LABEL,
    Object,
)
from job.launch.kubernetes.pods import LaunchedRun, PodKind, from_field, pod_template, present
from job.launch.kubernetes.settings import Settings

TRAINER_V2 = "trainer.kubeflow.org/v1alpha1"


def pytorch_job(run: LaunchedRun, settings: Settings) -> Object:
    """The PyTorchJob of a run. UserError for impossible settings.

    One node is a Master alone. Several are Workers alone, which find each other through torchrun's c10d rendezvous: the
    operator gives Workers beside a Master an init container that a namespace with restricted pod security refuses.
    """
    settings.refuse_impossible()
    replicas = {
        "replicas": settings.nodes,
        "restartPolicy": "ExitCode",  # retries codes of 128 and more, see job.errors.ExitCode
        "template": pod_template(run, settings, _pytorch_pod(settings)),
    }
    spec = present(
        {
            "runPolicy": present(
                {
                    "cleanPodPolicy": "Running",
                    "backoffLimit": max(1, settings.max_restarts),
                    "suspend": _starts_suspended(settings),
                    "activeDeadlineSeconds": _deadline_seconds(settings),
                }
            ),
            "nprocPerNode": str(settings.tasks),
            "elasticPolicy": _elastic_policy(run, settings) if settings.several_nodes else None,
            "pytorchReplicaSpecs": {"Worker" if settings.several_nodes else "Master": replicas},
        }
    )
    return _launched("kubeflow.org/v1", "PyTorchJob", run, settings, spec)


def _pytorch_pod(settings: Settings) -> PodKind:
    index = from_field(POD_INDEX_VARIABLE, f"metadata.labels['{INDEX_OF_POD_LABEL}']")
    if not settings.several_nodes:
        return PodKind("pytorch", JOB_OF_POD_LABEL, ["--standalone"], [index])
    environment = [
        index,
        from_field("PET_LOCAL_ADDR", "status.podIP"),  # an address: names of pods that are not ready do not resolve
        # With a store that is shared between rendezvous, ranks never start again after a node has joined.
        {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"},
    ]
    return PodKind("pytorch", JOB_OF_POD_LABEL, [], environment, gated=False)


def _elastic_policy(run: LaunchedRun, settings: Settings) -> Object:
    """How torchrun's rendezvous brings several nodes together."""
    return {
        "rdzvBackend": "c10d",
        "rdzvId": run.name,
        "minReplicas": settings.min_nodes or settings.nodes,
        "maxReplicas": settings.nodes,
        "maxRestarts": 0,  # restarts are the operator's: torchrun would start ranks again that were told to stop
        "rdzvConf": [{"key": "join_timeout", "value": str(60 * settings.start_min)}],
    }


def train_job(run: LaunchedRun, settings: Settings) -> list[Object]:
    """A TrainingRuntime with the pods of a run, and the TrainJob that runs them. UserError for impossible settings.

    (A ClusterTrainingRuntime has the same spec, and needs an administrator.)
    """
    settings.refuse_impossible()
    runtime = {
        "apiVersion": TRAINER_V2,
        "kind": "TrainingRuntime",
        "metadata": {"name": run.name, "labels": LABELS},
        "spec": {
            "mlPolicy": {"numNodes": settings.nodes, "torch": {}},
            "template": {
                "spec": {
                    "network": {"publishNotReadyAddresses": True},
                    "replicatedJobs": [_replicated_job(run, settings)],
                }
            },
        },
    }
    spec = present(
        {
            "runtimeRef": {"kind": "TrainingRuntime", "name": run.name},
            "suspend": _starts_suspended(settings),
            "trainer": {"numNodes": settings.nodes, "numProcPerNode": settings.tasks},
            "activeDeadlineSeconds": _deadline_seconds(settings),
        }
    )
    return [runtime, _launched(TRAINER_V2, "TrainJob", run, settings, spec)]


def _replicated_job(run: LaunchedRun, settings: Settings) -> Object:
    """The Job of a TrainJob's nodes, which is called node in the JobSet."""
    index = from_field(POD_INDEX_VARIABLE, "metadata.annotations['batch.kubernetes.io/job-completion-index']")
    template = pod_template(run, settings, PodKind("node", "jobset.sigs.k8s.io/jobset-name", [], [index]))
    template["spec"]["restartPolicy"] = "Never"
    job = {
        "backoffLimit": settings.max_restarts,
        "podFailurePolicy": {
            "rules": [
                _exit_code_rule("FailJob", ExitCode.FAILED, ExitCode.USAGE),
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                _exit_code_rule("Ignore", ExitCode.RETRY, ExitCode.STOPPED),
            ]
        },
        "template": template,
    }
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    return {"name": "node", "template": {"metadata": {"labels": labels}, "spec": job}}


def _exit_code_rule(action: str, *codes: ExitCode) -> Object:
    """What a Job does with a pod that ended with one of these codes; ignored ones do not count as failures."""
    return {
        "action": action,
        "onExitCodes": {"containerName": "node", "operator": "In", "values": [int(code) for code in codes]},
    }


def _starts_suspended(settings: Settings) -> bool:
    """Kueue starts jobs that are in its queue."""
    return settings.queue is not None


def _deadline_seconds(settings: Settings) -> int | None:
    return 60 * settings.deadline_min if settings.deadline_min is not None else None


def _launched(api_version: str, kind: str, run: LaunchedRun, settings: Settings, spec: Object) -> Object:
    """The object that a launcher finds again: by its labels, and by annotations that say what it is for."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    labels = present({SWEEP_LABEL: run.sweep or None, QUEUE_LABEL: settings.queue or None})
    annotations = {
        RUN_ANNOTATION: run.directory,
        OVERRIDES_ANNOTATION: run.overrides or None,
        DIGEST_ANNOTATION: digest,
        STOP_ANNOTATION: str(settings.stop_seconds),
    }
    metadata = {"name": run.name, "labels": LABELS | labels, "annotations": present(annotations)}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write what occurs twice twice: people read these files."""
        return True


def to_yaml(objects: list[Object]) -> str:
    """The objects as one stream of YAML."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=160, allow_unicode=True)

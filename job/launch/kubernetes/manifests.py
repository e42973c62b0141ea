"""The objects that train a run on Kubernetes, from the same settings.

A PyTorchJob of Kubeflow's training operator 1.9 describes its pods in full. A TrainJob of Kubeflow Trainer 2 is small:
it says what differs from a TrainingRuntime (k8s/runtime), which is installed once and describes the pods of all runs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import yaml

from job.errors import ExitCode
from job.launch.kubernetes.kinds import PYTORCH_JOB, TRAIN_JOB, Kind
from job.launch.kubernetes.names import (
    DIGEST_ANNOTATION,
    JOB_NAME_VARIABLE,
    LABELS,
    OVERRIDES_ANNOTATION,
    POD_INDEX_VARIABLE,
    QUEUE_LABEL,
    RUN_ANNOTATION,
    STOP_ANNOTATION,
    SWEEP_LABEL,
    Object,
)
from job.launch.kubernetes.pods import (
    ATTEMPT,
    LaunchedRun,
    PodKind,
    command,
    from_field,
    merged,
    pod_template,
    present,
    resources,
    variables,
    volumes,
)
from job.launch.kubernetes.settings import Settings

OURS = "cyclevae.io/launcher"  # who has made a runtimePatch


def job_of(kind: Kind, run: LaunchedRun, settings: Settings) -> Object:
    """The job of a run. UserError for settings that its kind cannot take."""
    return train_job(run, settings) if kind is TRAIN_JOB else pytorch_job(run, settings)


def pytorch_job(run: LaunchedRun, settings: Settings) -> Object:
    """The PyTorchJob of a run. UserError for impossible settings.

    One node is a Master alone. Several are Workers alone, which find each other through torchrun's c10d rendezvous: the
    operator gives Workers beside a Master an init container that a namespace with restricted pod security refuses.
    """
    settings.refuse_for_pytorch_job()
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
    return _launched(PYTORCH_JOB, run, settings, spec)


def _pytorch_pod(settings: Settings) -> PodKind:
    index = from_field(POD_INDEX_VARIABLE, f"metadata.labels['{PYTORCH_JOB.index_label}']")
    if not settings.several_nodes:
        return PodKind(PYTORCH_JOB, ["--standalone"], [index])
    environment = [
        index,
        from_field("PET_LOCAL_ADDR", "status.podIP"),  # an address: names of pods that are not ready do not resolve
        # With a store that is shared between rendezvous, ranks never start again after a node has joined.
        {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"},
    ]
    return PodKind(PYTORCH_JOB, [], environment, gated=False)


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


def train_job(run: LaunchedRun, settings: Settings) -> Object:
    """The TrainJob of a run: what differs from its TrainingRuntime. UserError for what cannot differ."""
    settings.refuse_for_train_job()
    trainer = present(
        {
            "image": settings.container.image,
            "command": command(run, settings, []),
            "env": variables(settings),
            "numNodes": settings.nodes,
            "numProcPerNode": settings.tasks,
            "resourcesPerNode": resources(settings) or None,
        }
    )
    spec = present(
        {
            "runtimeRef": {"kind": "TrainingRuntime", "name": settings.runtime},
            "suspend": _starts_suspended(settings),
            "trainer": trainer,
            "runtimePatches": [{"manager": OURS, "trainingRuntimeSpec": _of_nodes({"spec": _pod_patch(settings)})}],
            "activeDeadlineSeconds": _deadline_seconds(settings),
        }
    )
    return _launched(TRAIN_JOB, run, settings, spec)


def _of_nodes(pod: Object) -> Object:
    """What a runtime's spec, or a patch of it, says of the pods of its nodes, whose Job is called node."""
    nodes = {"name": "node", "template": {"spec": {"template": pod}}}
    return {"template": {"spec": {"replicatedJobs": [nodes]}}}


def _pod_patch(settings: Settings) -> Object:
    """What differs in the pods; lists replace those of the runtime."""
    spec = present(
        {
            "terminationGracePeriodSeconds": settings.grace_seconds,
            "tolerations": settings.all_tolerations,
            "volumes": volumes(settings),
            "nodeSelector": settings.node_selector or None,
            "serviceAccountName": settings.service_account or None,
            "imagePullSecrets": [{"name": secret} for secret in settings.container.pull_secrets] or None,
        }
    )
    patched: Object = merged(spec, settings.pod)
    return patched


def training_runtime(name: str, settings: Settings, ranks: int) -> Object:
    """The TrainingRuntime of TrainJobs: their pods, with the metrics' ports of up to `ranks` ranks.

    (A ClusterTrainingRuntime has the same spec, and needs an administrator.) Its own command trains the run that is
    called like the TrainJob with the arguments in CYCLEVAE_ARGUMENTS: who makes TrainJobs by other means, such as
    Kubeflow's SDK, can set variables, but no command.
    """
    sized = replace(settings, tasks_per_node=ranks, nodes=2)  # several nodes: pods are spread
    run = LaunchedRun(name, "", [])
    environment = [
        from_field(POD_INDEX_VARIABLE, "metadata.annotations['batch.kubernetes.io/job-completion-index']"),
        from_field(JOB_NAME_VARIABLE, f"metadata.labels['{TRAIN_JOB.job_label}']"),
    ]
    template = pod_template(run, sized, PodKind(TRAIN_JOB, [], environment))
    template["spec"]["restartPolicy"] = "Never"
    (spread,) = template["spec"]["topologySpreadConstraints"]
    # The pods of one job, whichever it is.
    spread |= {"labelSelector": {"matchLabels": LABELS}, "matchLabelKeys": [TRAIN_JOB.job_label]}
    (container,) = template["spec"]["containers"]
    container["command"] = ATTEMPT
    container.pop("resources", None)  # each TrainJob's own
    spec = _of_nodes(template)
    (nodes,) = spec["template"]["spec"]["replicatedJobs"]
    nodes["template"]["metadata"] = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    nodes["template"]["spec"] = _failure_policy(settings) | nodes["template"]["spec"]
    spec["template"]["spec"]["network"] = {"publishNotReadyAddresses": True}
    return {
        "apiVersion": TRAIN_JOB.api_version,
        "kind": "TrainingRuntime",
        "metadata": {"name": name, "labels": {**LABELS, "trainer.kubeflow.org/framework": "torch"}},
        "spec": {"mlPolicy": {"numNodes": 1, "torch": {}}, **spec},
    }


def _failure_policy(settings: Settings) -> Object:
    """What the Job of the nodes does with pods that failed."""
    return {
        "backoffLimit": settings.max_restarts,
        "podFailurePolicy": {
            "rules": [
                _exit_code_rule("FailJob", ExitCode.FAILED, ExitCode.USAGE),
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                _exit_code_rule("Ignore", ExitCode.RETRY, ExitCode.STOPPED),
            ]
        },
    }


def _exit_code_rule(action: str, *codes: ExitCode) -> Object:
    """What a Job does with a pod that ended with one of these codes; ignored ones do not count as failures."""
    return {
        "action": action,
        "onExitCodes": {
            "containerName": TRAIN_JOB.container,
            "operator": "In",
            "values": [int(code) for code in codes],
        },
    }


def _starts_suspended(settings: Settings) -> bool:
    """Kueue starts jobs that are in its queue."""
    return settings.queue is not None


def _deadline_seconds(settings: Settings) -> int | None:
    return 60 * settings.deadline_min if settings.deadline_min is not None else None


def _launched(kind: Kind, run: LaunchedRun, settings: Settings, spec: Object) -> Object:
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
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, "spec": spec}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write what occurs twice twice: people read these files."""
        return True


def to_yaml(objects: list[Object]) -> str:
    """The objects as one stream of YAML."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=160, allow_unicode=True)

"""What a job, its pods and their metrics tell about a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from job.failure_records import Failure
from job.launch.failures import end_of_log, first_cause
from job.launch.kubernetes.cluster import Cluster
from job.launch.kubernetes.names import QUEUE_LABEL, RUN_ANNOTATION, Object
from job.launch.kubernetes.status_lines import for_people, last_progress
from job.launch.run_status import RunStatus

OVER = ("COMPLETED", "FAILED", "SUSPENDED", "DELETED")
STARTING = ("PodInitializing", "ContainerCreating")  # a container waits for these without anything being wrong
SAMPLE = re.compile(r"^(cyclevae_\w+)\{([^}]*)\} (\S+)", re.MULTILINE)
MEASURED = {
    "cyclevae_step": "step",
    "cyclevae_target_steps": "steps",
    "cyclevae_loss": "loss",
    "cyclevae_tokens_per_second": "tokens_per_second",
    "cyclevae_restarts_total": "restarts",
    "cyclevae_step_duration_seconds_sum": "seconds",
    "cyclevae_step_duration_seconds_count": "done",
}


def state(job: Object) -> str:
    """PENDING, QUEUED (by Kueue), RUNNING, RESTARTING, SUSPENDED (by cancel), COMPLETED or FAILED."""
    conditions = job.get("status", {}).get("conditions") or []
    true = {condition["type"] for condition in conditions if condition["status"] == "True"}
    if "Succeeded" in true:
        return "COMPLETED"
    if "Failed" in true:
        return "FAILED"
    if job["spec"]["runPolicy"].get("suspend"):
        return "QUEUED" if QUEUE_LABEL in job["metadata"]["labels"] else "SUSPENDED"
    if "Restarting" in true:
        return "RESTARTING"
    return "RUNNING" if "Running" in true else "PENDING"


def run_status(cluster: Cluster, job: Object) -> RunStatus:
    """What is known of the run of a job: from its first rank's metrics, else from the end of its log."""
    name, now = job["metadata"]["name"], state(job)
    pods = cluster.pods(name)
    values: dict[str, Any] = {}
    alive = False
    for pod in pods if now in ("RUNNING", "RESTARTING") else []:
        values = measured(cluster.metrics(pod) or "")
        if values.get("steps"):  # rank 0 alone knows of the whole run
            alive = cluster.metrics(pod, "healthz") is not None
            break
    if not values.get("steps"):
        logs = (cluster.log(pod.metadata.name, 100) for pod in pods)
        values = next((progress for log in logs if (progress := last_progress(log))), {})
    return RunStatus(
        run=job["metadata"].get("annotations", {}).get(RUN_ANNOTATION, name),
        job=name,
        state=now,
        alive=alive,
        step=int(values.get("step", 0)),
        steps=int(values["steps"]) if values else None,
        loss=values.get("loss"),
        tokens_per_second=values.get("tokens_per_second"),
        seconds_left=values.get("seconds_left"),
        restarts=int(values["restarts"]) if "restarts" in values else None,
        reason=reason(cluster, job, pods),
        log=f"cyclevae k8s logs {name}",
    )


def measured(text: str) -> dict[str, Any]:
    """The numbers of a rank's metrics, from the text of its endpoint."""
    values: dict[str, Any] = {
        MEASURED[name]: float(number)
        for name, labels, number in SAMPLE.findall(text)
        if name in MEASURED and (name != "cyclevae_loss" or 'term="total"' in labels)
    }
    if values.get("done") and "steps" in values:
        values["seconds_left"] = round((values["steps"] - values["step"]) * values["seconds"] / values["done"])
    return values


def reason(cluster: Cluster, job: Object, pods: Sequence[Any]) -> str | None:
    """Why a job does not run."""
    now = state(job)
    if now == "COMPLETED":
        return None
    if now == "FAILED":
        known = (outcome(job, pods), first_failure(cluster, pods))
        return " ".join(part for part in known if part)
    if now == "SUSPENDED":
        return f"cancelled: cyclevae k8s resume {job['metadata']['name']}"
    return next((found for pod in pods if (found := _waits_for(pod))), None)


def _waits_for(pod: Any) -> str | None:
    """What keeps a pod from starting."""
    for container in _containers(pod):
        waiting = container.state and container.state.waiting
        if waiting and waiting.reason not in STARTING:
            return f"{pod.metadata.name}: {waiting.reason}: {waiting.message or ''}".rstrip(": ")
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{pod.metadata.name}: {condition.message}"
    return None


def outcome(job: Object, pods: Sequence[Any]) -> str:
    """How a job ended: COMPLETED, FAILED (exit code 1), ..."""
    if state(job) != "FAILED":
        return state(job)
    code = next((ended.exit_code for ended in _terminated(pods) if ended.exit_code), None)
    if code is not None:
        return f"FAILED (exit code {code})"
    failed = (one["message"] for one in job["status"]["conditions"] if one["type"] == "Failed")
    return f"FAILED ({next(failed, 'no reason given')})"


def first_failure(cluster: Cluster, pods: Sequence[Any]) -> str | None:
    """Why a job's pods failed: the first rank's failure, not what the others said of losing it.

    The end of a failed pod's log when no failure was recorded; None without a log.
    """
    recorded = (recorded_failure(ended.message) for ended in _terminated(pods))
    cause = first_cause(failure for failure in recorded if failure is not None)
    if cause is not None:
        return str(cause)
    failed = [pod for pod in pods if any(ended.exit_code for ended in _terminated([pod]))]
    logs = ("\n".join(for_people(cluster.log(pod.metadata.name, 100))) for pod in failed or pods)
    return next((end for log in logs if (end := end_of_log(log))), None)


def recorded_failure(message: str | None) -> Failure | None:
    """The failure in a container's message, which attempt.py leaves there; None for another program's message."""
    try:
        record = json.loads(message or "")
    except json.JSONDecodeError:
        return None
    return Failure.of_record(record) if isinstance(record, dict) else None


def _containers(pod: Any) -> list[Any]:
    return [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]


def _terminated(pods: Sequence[Any]) -> Iterator[Any]:
    """How those containers of pods ended that did."""
    for pod in pods:
        for container in _containers(pod):
            if container.state and container.state.terminated:
                yield container.state.terminated

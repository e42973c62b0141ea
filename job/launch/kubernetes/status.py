"""What a job, its pods and their metrics tell about a run."""

from __future__ import annotations

import re
from typing import Any

from job.launch.kubernetes.cluster import Cluster
from job.launch.kubernetes.manifests import QUEUE, RUN, Object
from job.launch.slurm.run_directory import COLLATERAL, FAILURE

OVER = ("COMPLETED", "FAILED", "SUSPENDED", "DELETED")
SAMPLE = re.compile(r"^(cyclevae_\w+)\{([^}]*)\} (\S+)", re.MULTILINE)
PROGRESS = re.compile(r"^step (\d+)/(\d+)  loss (\S+) .*?([\d.e+]+)(k?) tokens/s  ([\d:]+) left", re.MULTILINE)
SHOWN = {
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
    true = {
        condition["type"]
        for condition in job.get("status", {}).get("conditions") or []
        if condition["status"] == "True"
    }
    if "Succeeded" in true:
        return "COMPLETED"
    if "Failed" in true:
        return "FAILED"
    if job["spec"]["runPolicy"].get("suspend"):
        return "QUEUED" if QUEUE in job["metadata"]["labels"] else "SUSPENDED"
    return "RESTARTING" if "Restarting" in true else "RUNNING" if "Running" in true else "PENDING"


def row(cluster: Cluster, job: Object) -> dict[str, Any]:
    """Job, state, whether it is alive, step, loss, rate, seconds left, restarts, reason; the keys are those of job.launch.slurm.run_directory."""
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
        values = next((found for pod in pods if (found := printed(cluster.log(pod.metadata.name, 100)))), {})
    return {
        "run": job["metadata"].get("annotations", {}).get(RUN, name),
        "job": name,
        "state": now,
        "alive": alive,
        "step": int(values.get("step", 0)),
        "steps": int(values["steps"]) if values else None,
        "loss": values.get("loss"),
        "tokens_per_second": values.get("tokens_per_second"),
        "seconds_left": values.get("seconds_left"),
        "restarts": int(values["restarts"]) if "restarts" in values else None,
        "reason": reason(cluster, job, pods),
        "log": f"cyclevae k8s logs {name}",
    }


def measured(text: str) -> dict[str, float]:
    """The numbers of a rank's metrics."""
    values = {
        SHOWN[name]: float(number)
        for name, labels, number in SAMPLE.findall(text)
        if name in SHOWN and (name != "cyclevae_loss" or 'term="total"' in labels)
    }
    if values.get("done") and "steps" in values:
        values["seconds_left"] = round((values["steps"] - values["step"]) * values["seconds"] / values["done"])
    return values


def printed(text: str) -> dict[str, float]:
    """The numbers of the last line of progress in a log."""
    lines = PROGRESS.findall(text)
    if not lines:
        return {}
    step, steps, loss, rate, thousands, left = lines[-1]
    seconds = 0
    for part in left.split(":"):
        seconds = 60 * seconds + int(part)
    return {
        "step": int(step),
        "steps": int(steps),
        "loss": float(loss),
        "tokens_per_second": float(rate) * (1000 if thousands else 1),
        "seconds_left": seconds,
    }


def reason(cluster: Cluster, job: Object, pods: list[Any]) -> str | None:
    """Why a job does not run."""
    now = state(job)
    if now == "FAILED":
        return " ".join(part for part in (outcome(cluster, job), first_failure(cluster, job)) if part)
    if now == "SUSPENDED":
        return f"cancelled: cyclevae k8s resume {job['metadata']['name']}"
    for pod in pods if now != "COMPLETED" else []:
        for container in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]:
            waiting = container.state and container.state.waiting
            if waiting and waiting.reason not in ("PodInitializing", "ContainerCreating"):
                return f"{pod.metadata.name}: {waiting.reason}: {waiting.message or ''}".rstrip(": ")
        for condition in pod.status.conditions or []:
            if condition.type == "PodScheduled" and condition.status == "False":
                return f"{pod.metadata.name}: {condition.message}"
    return None


def outcome(cluster: Cluster, job: Object) -> str:
    """How a job ended: COMPLETED, FAILED (exit code 1), ..."""
    if state(job) != "FAILED":
        return state(job)
    code = next(
        (
            status.state.terminated.exit_code
            for pod in cluster.pods(job["metadata"]["name"])
            for status in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]
            if status.state.terminated and status.state.terminated.exit_code
        ),
        None,
    )
    if code is not None:
        return f"FAILED (exit code {code})"
    return f"FAILED ({next((one['message'] for one in job['status']['conditions'] if one['type'] == 'Failed'), 'no reason given')})"


def first_failure(cluster: Cluster, job: Object) -> str | None:
    """What the first failing rank said, not what the others said of losing it."""
    said = [
        line
        for pod in cluster.pods(job["metadata"]["name"])
        for line in cluster.log(pod.metadata.name, 1000).splitlines()
        if FAILURE.match(line)
    ]
    return next(iter([line for line in said if not COLLATERAL.search(line)] or said), None)

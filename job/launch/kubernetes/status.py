"""What a job, its pods and their metrics tell about a run."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from job.errors import UserError
from job.failure_records import Failure
from job.launch.failures import end_of_log, first_cause
from job.launch.kubernetes.cluster import Cluster, Unreachable
from job.launch.kubernetes.kinds import annotation, conditions, kind_of, pod_index, state
from job.launch.kubernetes.names import CANCELLED_ANNOTATION, RUN_ANNOTATION, Object
from job.launch.kubernetes.pods import present
from job.launch.kubernetes.status_lines import for_people, last_progress
from job.launch.run_status import RunStatus

LAST_QUESTIONS = 3
WORKLOAD_SECONDS = 60  # in which Kueue makes a Workload of a job, where it manages its kind
# Conditions of a Workload whose message says what it waits for. Without quota it is not admitted, which says less.
WAITING = ("QuotaReserved", "Admitted")
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


def run_status(cluster: Cluster, job: Object) -> RunStatus:
    """What is known of the run of a job.

    Numbers come from its first rank's metrics, else from the end of its log, else from the job itself. What a pod does
    not answer is a reason in this row: one job's trouble must not hide the others.
    """
    name, now = job["metadata"]["name"], state(job)
    troubles: list[str] = []
    values: dict[str, Any] = {}
    alive = False
    why: str | None = None
    try:
        pods = cluster.pods(job)
        values, alive = _measured_by(cluster, pods if now in ("RUNNING", "RESTARTING") else [])
        values = values or _logged_by(cluster, pods, troubles) or _noted_in(job)
        why = reason(cluster, job, pods)
    except (Unreachable, UserError) as error:  # the server answers, but not to this
        troubles.append(str(error))
    return RunStatus(
        run=annotation(job, RUN_ANNOTATION) or name,
        job=name,
        state=now,
        alive=alive,
        step=int(values.get("step", 0)),
        steps=int(values["steps"]) if values.get("steps") else None,
        loss=values.get("loss"),
        tokens_per_second=values.get("tokens_per_second"),
        seconds_left=values.get("seconds_left"),
        restarts=int(values["restarts"]) if "restarts" in values else None,
        reason=why or next(iter(troubles), None),
        log=f"cyclevae k8s logs {name}",
    )


def _measured_by(cluster: Cluster, pods: Sequence[Any]) -> tuple[dict[str, Any], bool]:
    """The numbers of the rank that knows of the whole run, rank 0, and whether it is healthy; empty without it."""
    for pod in pods:
        values = measured(cluster.metrics(pod) or "")
        if values.get("steps"):
            return values, cluster.metrics(pod, "healthz") is not None
    return {}, False


def _logged_by(cluster: Cluster, pods: Sequence[Any], troubles: list[str]) -> dict[str, Any]:
    """The last progress in the logs of pods; logs that cannot be read are noted among `troubles`."""
    for pod in pods:
        try:
            progress = last_progress(cluster.log(pod.metadata.name, 100))
        except (Unreachable, UserError) as error:  # its node is away, for instance
            troubles.append(str(error))
            continue
        if progress:
            return progress
    return {}


def _noted_in(job: Object) -> dict[str, Any]:
    """What a job without pods tells: a TrainJob's own status, and what `cancel` has noted."""
    posted = job.get("status", {}).get("trainerStatus")
    if posted:
        values: dict[str, Any] = {one["name"]: float(one["value"]) for one in posted.get("metrics") or []}
        return values | present({"seconds_left": posted.get("estimatedRemainingSeconds")})
    try:
        noted = json.loads(annotation(job, CANCELLED_ANNOTATION) or "{}")
    except json.JSONDecodeError:  # written by hand
        return {}
    return noted if isinstance(noted, dict) else {}


def last_progress_to_note(cluster: Cluster, job: Object) -> str:
    """What `cancel` notes in a job: its pods, and with them their logs, will be gone.

    A node that is busy may fail to answer once, and nobody can be asked later: a run that should be known is asked for
    three times.
    """
    for _ in range(LAST_QUESTIONS):
        row = run_status(cluster, job)
        if row.steps is not None or row.state != "RUNNING":
            break
        time.sleep(1.0)
    return json.dumps(present({"step": row.step, "steps": row.steps, "loss": row.loss}))


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
        known = (outcome(job, pods), first_failure(cluster, job, pods))
        return " ".join(part for part in known if part)
    if now == "SUSPENDED":
        return f"cancelled: cyclevae k8s resume {job['metadata']['name']}"
    if now == "QUEUED":
        return queue_reason(job, cluster.workload(job))
    lost = next((found for pod in pods if (found := lost_node(pod))), None)
    waits = next((found for pod in pods if (found := _waits_for(pod))), None)
    return lost or waits or (_last_warning(cluster, job) if now == "RESTARTING" else None)


def queue_reason(job: Object, workload: Object | None) -> str | None:
    """Why Kueue does not let a job run: its own words."""
    if workload is not None:
        waiting = {one["type"]: one["message"] for one in conditions(workload) if one["status"] == "False"}
        return next((f"Kueue: {waiting[kind]}" for kind in WAITING if kind in waiting), None)
    made = datetime.fromisoformat(job["metadata"]["creationTimestamp"])
    if (datetime.now(UTC) - made).total_seconds() < WORKLOAD_SECONDS:
        return None
    kind = kind_of(job)
    return (
        f"Kueue has made no Workload of it: it does not manage {kind.name}s here (integrations.frameworks in its "
        f"configuration: {kind.group}/{kind.name.lower()}), so the job would wait for ever"
    )


def lost_node(pod: Any) -> str | None:
    """What to know of a pod whose node does not answer; None where it does.

    The node's own agent reports containers as ready or not. When it has not been heard of for a while the cluster
    calls the pod not ready, but cannot change what the agent last said of the containers.
    """
    held = {one.type: one for one in pod.status.conditions or []}
    ready, of_containers = held.get("Ready"), held.get("ContainersReady")
    if ready is None or of_containers is None or (ready.status, of_containers.status) != ("False", "True"):
        return None
    since = f" since {ready.last_transition_time}" if ready.last_transition_time else ""
    first = " It holds the rendezvous, without which an elastic run cannot go on." if pod_index(pod) == 0 else ""
    return (
        f"{pod.spec.node_name} does not answer{since}: {pod.metadata.name} is made again when the node is back, "
        f"deleted, or tainted node.kubernetes.io/out-of-service.{first}"
    )


def _last_warning(cluster: Cluster, job: Object) -> str | None:
    """The last thing that the cluster warned of; probes that fail while a pod starts or ends are no cause."""
    found = [event for event in cluster.warnings(job) if event.reason != "Unhealthy"]
    return next((f"{event.involved_object.name}: {event.reason}: {event.message}" for event in reversed(found)), None)


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
    failed = (one["message"] for one in conditions(job) if one["type"] == "Failed")
    return f"FAILED ({next(failed, 'no reason given')})"


def first_failure(cluster: Cluster, job: Object, pods: Sequence[Any]) -> str | None:
    """Why a job's pods failed: the first rank's failure, not what the others said of losing it.

    Without a record, what Kubernetes says of a container that it killed, or the end of a failed pod's log; without
    pods, the last warning of the cluster.
    """
    recorded = (recorded_failure(ended.message) for ended in _terminated(pods))
    cause = first_cause(failure for failure in recorded if failure is not None)
    if cause is not None:
        return str(cause)
    killed = next((pod for pod in pods if any(ended.reason == "OOMKilled" for ended in _terminated([pod]))), None)
    if killed is not None:
        return f"{killed.metadata.name} was killed at its memory limit; raise hydra.launcher.mem_gb"
    if not pods:
        return _last_warning(cluster, job)
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

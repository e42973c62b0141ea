"""Plays Kubeflow Trainer 2 with JobSet, and Kueue, on a cluster that has neither, as seen of the real ones.

Trainer: the runtime is copied when a TrainJob is first seen; pods NAME-node-0-INDEX-xxxxx with PET_* variables; failed
pods stay, and the Job's podFailurePolicy says whether another is made. Kueue: a Workload for every job with its label,
which is admitted while there is room and the Workload is active; a job that is not is suspended. Left out: webhooks,
initializers, the backoff of a Job (10 s, doubling), quotas.
"""

from __future__ import annotations

import copy
import secrets
from typing import Any

from k8s_node import Node, free_ports
from k8s_operator import Object, Player, for_a_cluster_without_network, is_true, now

TRAINER = "apis/trainer.kubeflow.org/v1alpha1"
KUEUE = "apis/kueue.x-k8s.io/v1beta1"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
INDEX = "batch.kubernetes.io/job-completion-index"
KINDS = {
    "trainer.kubeflow.org/v1alpha1": {"TrainJob": "trainjobs", "TrainingRuntime": "trainingruntimes"},
    "kueue.x-k8s.io/v1beta1": {"Workload": "workloads", "LocalQueue": "localqueues"},
}


def definitions(group_version: str) -> list[Object]:
    """Definitions of a group's kinds that take any field: the real ones need a newer server."""
    group, version = group_version.split("/")
    anything = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return [
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{group}"},
            "spec": {
                "group": group,
                "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"},
                "versions": [
                    {
                        "name": version,
                        "served": True,
                        "storage": True,
                        "schema": anything,
                        "subresources": {"status": {}},
                    }
                ],
            },
        }
        for kind, plural in KINDS[group_version].items()
    ]


def set_condition(status: Object, kind: str, holds: bool, reason: str, message: str) -> None:
    """Set a condition as these controllers do; the time is that of its last change."""
    conditions = status.setdefault("conditions", [])
    same = next((one for one in conditions if one["type"] == kind), None)
    if same is not None and (same["status"], same["reason"]) == (str(holds), reason):
        return
    kept = [one for one in conditions if one["type"] != kind]
    new = {"type": kind, "status": str(holds), "reason": reason, "message": message, "lastTransitionTime": now()}
    status["conditions"] = [*kept, new]


def merged(base: Object, patch: Object) -> Object:
    """A pod's spec with a runtimePatch: lists of named things are merged by name, all else is replaced."""
    result = dict(base)
    for key, value in patch.items():
        if isinstance(value, list) and value and all("name" in one for one in value):
            named = {one["name"]: one for one in [*base.get(key, []), *value]}
            result[key] = list(named.values())
        else:
            result[key] = value
    return result


def pod_of(job: Object, runtime: Object, index: int) -> Object:
    """The pod that comes of a TrainJob and its runtime for a node."""
    name, trainer = job["metadata"]["name"], job["spec"].get("trainer", {})
    (nodes,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod: Object = copy.deepcopy(nodes["template"]["spec"]["template"])
    for one in job["spec"].get("runtimePatches", []):
        (patch,) = one["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod["spec"] = merged(pod["spec"], patch["template"]["spec"]["template"]["spec"])
    (container,) = pod["spec"]["containers"]
    for field in ("image", "command", "args"):
        if field in trainer:
            container[field] = trainer[field]
    if "resourcesPerNode" in trainer:
        container["resources"] = trainer["resourcesPerNode"]
    given = {
        "PET_NNODES": str(nodes_of(job, runtime)),
        "PET_NPROC_PER_NODE": str(trainer.get("numProcPerNode", 1)),
        "PET_NODE_RANK": str(index),
        "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
        "PET_MASTER_PORT": "29500",
        "JOB_COMPLETION_INDEX": str(index),
    }
    own = {one["name"]: one for one in [*container.get("env", []), *trainer.get("env", [])]}
    container["env"] = [*own.values(), *({"name": key, "value": value} for key, value in given.items())]
    labels = {**pod["metadata"].get("labels", {}), JOBSET_LABEL: name, INDEX: str(index)}
    pod["metadata"] = {
        "name": f"{name}-node-0-{index}-{secrets.token_hex(3)[:5]}",
        "labels": labels,
        "annotations": {INDEX: str(index)},
        "ownerReferences": [{**owner(job, "trainer.kubeflow.org/v1alpha1", "TrainJob"), "blockOwnerDeletion": True}],
    }
    return pod


def nodes_of(job: Object, runtime: Object) -> int:
    return int(job["spec"].get("trainer", {}).get("numNodes") or runtime["spec"]["mlPolicy"]["numNodes"])


def owner(job: Object, api_version: str, kind: str) -> Object:
    metadata = job["metadata"]
    return {
        "apiVersion": api_version,
        "kind": kind,
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
    }


class Trainer(Player):
    """Trainer at work in a thread, on all namespaces, until `stop`."""

    def __init__(self, node: Node) -> None:
        self._runtimes: dict[str, Object] = {}  # as they were when their jobs were first seen
        self._ports: dict[str, int] = {}
        super().__init__(node, "trainer")

    def look(self) -> None:
        for job in self.ask("GET", f"{TRAINER}/trainjobs")["items"]:
            if "deletionTimestamp" not in job["metadata"]:
                self._reconcile(job)

    def _reconcile(self, job: Object) -> None:
        metadata, status = job["metadata"], copy.deepcopy(job.get("status") or {})
        if is_true(status, "Complete") or is_true(status, "Failed"):
            return
        where = f"{TRAINER}/namespaces/{metadata['namespace']}"
        if metadata["uid"] not in self._runtimes:
            name = job["spec"]["runtimeRef"]["name"]
            self._runtimes[metadata["uid"]] = self.ask("GET", f"{where}/trainingruntimes/{name}")
        runtime = self._runtimes[metadata["uid"]]
        selector = f"labelSelector={JOBSET_LABEL}={metadata['name']}"
        pods = self.ask("GET", f"api/v1/namespaces/{metadata['namespace']}/pods?{selector}")["items"]
        pods = [pod for pod in pods if pod["metadata"]["ownerReferences"][0]["uid"] == metadata["uid"]]
        if job["spec"].get("suspend"):
            for pod in pods:
                self.delete_pod(pod)
            set_condition(status, "Suspended", True, "Suspended", "TrainJob is suspended")
        else:
            if is_true(status, "Suspended"):
                set_condition(status, "Suspended", False, "Resumed", "TrainJob is resumed")
            self._run(job, runtime, pods, status)
        if status != (job.get("status") or {}):
            self.ask("PATCH", f"{where}/trainjobs/{metadata['name']}/status", {"status": status})

    def _run(self, job: Object, runtime: Object, pods: list[Object], status: Object) -> None:
        """Make the pods that are missing, and conclude from those that have ended."""
        (nodes,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        policy = nodes["template"]["spec"]
        counted = 0
        for pod in pods:
            action = self._action(policy, pod)
            counted += action == "Count"
            if action == "FailJob":
                self._fail(pods, status)
                return
        if counted > policy["backoffLimit"]:
            self._fail(pods, status)
            return
        phases: dict[int, set[str]] = {index: set() for index in range(nodes_of(job, runtime))}
        for pod in pods:
            phases[int(pod["metadata"]["labels"][INDEX])].add(pod["status"]["phase"])
        missing = [index for index, there in phases.items() if not there & {"Pending", "Running", "Succeeded"}]
        for index in missing:
            port = self._ports.setdefault(job["metadata"]["uid"], free_ports(1)[0])
            pod = for_a_cluster_without_network(pod_of(job, runtime, index), port, index)
            self.ask("POST", f"api/v1/namespaces/{job['metadata']['namespace']}/pods", pod)
        active = sum(bool(there & {"Pending", "Running"}) for there in phases.values())
        succeeded = sum("Succeeded" in there for there in phases.values())
        ready = sum("Running" in there for there in phases.values())
        numbers = {"name": "node", "active": active, "ready": ready, "succeeded": succeeded, "failed": counted}
        status["jobsStatus"] = [{**numbers, "suspended": 0}]
        if succeeded == len(phases):
            set_condition(status, "Complete", True, "AllJobsCompleted", "jobset completed successfully")

    def _action(self, policy: Object, pod: Object) -> str | None:
        """What the Job's podFailurePolicy says of a pod; None of one that has not failed."""
        if pod["status"]["phase"] != "Failed":
            return None
        ended = [one["state"].get("terminated") for one in pod["status"].get("containerStatuses", [])]
        code = ended[0]["exitCode"] if ended and ended[0] else None  # None: evicted, a DisruptionTarget
        for rule in policy["podFailurePolicy"]["rules"]:
            if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
                return str(rule["action"])
        return "Ignore" if code is None else "Count"

    def _fail(self, pods: list[Object], status: Object) -> None:
        for pod in pods:
            if pod["status"]["phase"] in ("Pending", "Running"):
                self.delete_pod(pod)
        set_condition(status, "Failed", True, "FailedJobs", "jobset failed due to one or more job failures")


class Kueue(Player):
    """Kueue at work in a thread. Jobs of `manages` are queued; they run while there is `room`."""

    def __init__(self, node: Node, manages: tuple[str, ...]) -> None:
        self.manages, self.room = manages, True
        super().__init__(node, "kueue")

    def look(self) -> None:
        for plural, (api, kind) in {
            "pytorchjobs": ("kubeflow.org/v1", "PyTorchJob"),
            "trainjobs": ("trainer.kubeflow.org/v1alpha1", "TrainJob"),
        }.items():
            if plural not in self.manages:
                continue
            for job in self.ask("GET", f"apis/{api}/{plural}")["items"]:
                if QUEUE_LABEL in job["metadata"].get("labels", {}) and "deletionTimestamp" not in job["metadata"]:
                    self._reconcile(job, api, plural, kind)

    def _reconcile(self, job: Object, api: str, plural: str, kind: str) -> None:
        namespace, uid = job["metadata"]["namespace"], job["metadata"]["uid"]
        found = self.ask("GET", f"{KUEUE}/namespaces/{namespace}/workloads")["items"]
        mine = next((one for one in found if one["metadata"]["ownerReferences"][0]["uid"] == uid), None)
        if mine is None:
            name = f"{kind.lower()}-{job['metadata']['name']}-{secrets.token_hex(3)[:5]}"
            workload = {
                "apiVersion": "kueue.x-k8s.io/v1beta1",
                "kind": "Workload",
                "metadata": {"name": name, "ownerReferences": [owner(job, api, kind)]},
                "spec": {"active": True, "queueName": job["metadata"]["labels"][QUEUE_LABEL]},
            }
            self.ask("POST", f"{KUEUE}/namespaces/{namespace}/workloads", workload)
            return
        active = mine["spec"].get("active", True)
        over = any(is_true(job.get("status") or {}, one) for one in ("Succeeded", "Complete", "Failed"))
        admitted = over or (self._is_open(namespace, job["metadata"]["labels"][QUEUE_LABEL]) and active)
        status: Any = copy.deepcopy(mine.get("status") or {})
        if over:
            set_condition(status, "Finished", True, "Succeeded", "Job finished")
        elif admitted:
            self._admit(status)
        else:
            self._evict(status, "Preempted" if active else "Deactivated")
        if status != (mine.get("status") or {}):
            path = f"{KUEUE}/namespaces/{namespace}/workloads/{mine['metadata']['name']}/status"
            self.ask("PATCH", path, {"status": status})
        change: Object = {"suspend": not admitted}
        if kind == "PyTorchJob":
            change = {"runPolicy": change}
        if self._suspended(job, kind) is admitted:
            self.ask("PATCH", f"apis/{api}/namespaces/{namespace}/{plural}/{job['metadata']['name']}", {"spec": change})

    def _is_open(self, namespace: str, queue: str) -> bool:
        """Whether there is room, and the LocalQueue is not stopped."""
        found = self.ask("GET", f"{KUEUE}/namespaces/{namespace}/localqueues/{queue}")
        return self.room and found.get("spec", {}).get("stopPolicy", "None") == "None"

    @staticmethod
    def _admit(status: Object) -> None:
        set_condition(status, "QuotaReserved", True, "QuotaReserved", "Quota reserved in ClusterQueue cyclevae")
        set_condition(status, "Admitted", True, "Admitted", "The workload is admitted")
        if is_true(status, "Evicted"):
            set_condition(status, "Evicted", False, "QuotaReserved", "Previously evicted")

    @staticmethod
    def _evict(status: Object, why: str) -> None:
        """Also of a Workload that was never admitted, which then only has no quota."""
        words = "couldn't assign flavors to pod set main: insufficient quota for cpu in flavor default"
        if is_true(status, "Admitted"):
            set_condition(status, "Evicted", True, why, f"The workload was evicted: {why}")
            set_condition(status, "Admitted", False, "NoReservation", "The workload has no reservation")
        set_condition(status, "QuotaReserved", False, "Pending", words)

    @staticmethod
    def _suspended(job: Object, kind: str) -> bool:
        spec = job["spec"]["runPolicy"] if kind == "PyTorchJob" else job["spec"]
        return bool(spec.get("suspend"))

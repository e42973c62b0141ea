"""Plays Kubeflow's training operator 1.9 for PyTorchJobs on a cluster that has none.

It makes pods and services, gives them their environment, makes them again, and sets conditions. Followed is
kubeflow/training-operator, release-1.9:

    pkg/controller.v1/pytorch/{envvar,elastic,master,pytorchjob_controller}.go
    pkg/controller.v1/common/{job,pod,service}.go
    pkg/core/{job,status}.go, pkg/util/status.go, pkg/apis/kubeflow.org/v1/pytorch_defaults.go

Two things there surprise: a job with an elasticPolicy has succeeded when any one Worker has, and under restartPolicy
ExitCode no backoffLimit but 0 ever takes effect, since pods that are deleted and made again have no container restarts
to be counted (kubeflow/trainer issue 2045). Left out: gang scheduling, autoscaling, events, and the init container of
Workers beside a Master, which waits for the Master's DNS name.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
import threading
import traceback
from typing import Any

import urllib3
from k8s_node import Node, free_ports
from urllib3.exceptions import HTTPError

Object = dict[str, Any]
GROUP = "apis/kubeflow.org/v1"
LABEL = "training.kubeflow.org/"
PORT_NAME, PORT = "pytorchjob-port", 23456
NO_EXIT_CODE = (
    0xBEEF  # of a pod that failed without a container's word, by eviction for instance: counts as one to retry
)


def with_defaults(job: Object) -> Object:
    """The job with what the operator's webhook of defaults would add."""
    job = copy.deepcopy(job)
    spec = job["spec"]
    spec.setdefault("runPolicy", {}).setdefault("cleanPodPolicy", "None")
    for replica in spec["pytorchReplicaSpecs"].values():
        replica.setdefault("replicas", 1)
        replica.setdefault("restartPolicy", "OnFailure")
        ports = trainer(replica["template"]).setdefault("ports", [])
        if not any(port.get("name") == PORT_NAME for port in ports):
            ports.append({"name": PORT_NAME, "containerPort": PORT})
    elastic = spec.get("elasticPolicy")
    if elastic is not None:
        workers = spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
        lowest, highest = elastic.get("minReplicas"), elastic.get("maxReplicas")
        elastic |= {"minReplicas": lowest or highest or workers, "maxReplicas": highest or lowest or workers}
    if elastic is None or "nProcPerNode" not in elastic:
        spec.setdefault("nprocPerNode", "auto")
    return job


def trainer(template: Object) -> Object:
    """The container that the operator cares for: the one called pytorch."""
    return next(container for container in template["spec"]["containers"] if container["name"] == "pytorch")


def environment(job: Object, kind: str, index: int) -> dict[str, str]:
    """Variables that every container of replica `index` of `kind` (Master, Worker) gets besides its own."""
    spec, name = job["spec"], job["metadata"]["name"]
    replicas, elastic = spec["pytorchReplicaSpecs"], spec.get("elasticPolicy")
    total = sum(replica["replicas"] for replica in replicas.values())
    per_node = str(spec.get("nprocPerNode", 1))
    values = {"PYTHONUNBUFFERED": "1"}
    if "Master" in replicas:
        port, rank = _port(replicas["Master"]), index + (kind == "Worker")
        values |= {
            "MASTER_PORT": port,
            "PET_MASTER_PORT": port,
            "MASTER_ADDR": f"{name}-master-0",
            "PET_MASTER_ADDR": f"{name}-master-0",
            "WORLD_SIZE": str(total * (int(per_node) if per_node.isdigit() else 1)),
            "RANK": str(rank),
            "PET_NODE_RANK": str(rank),
        }
    if "nprocPerNode" in spec:
        values["PET_NPROC_PER_NODE"] = per_node
    if elastic is None:
        return {**values, "PET_NNODES": str(total)}
    endpoint = f"{elastic.get('rdzvHost', f'{name}-worker-0')}:{elastic.get('rdzvPort') or _port(replicas['Worker'])}"
    values |= {
        "PET_RDZV_ENDPOINT": endpoint,
        "PET_RDZV_BACKEND": elastic.get("rdzvBackend", "c10d"),
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
    }
    optional = {"PET_MAX_RESTARTS": "maxRestarts", "PET_NPROC_PER_NODE": "nProcPerNode", "PET_RDZV_ID": "rdzvId"}
    values |= {variable: str(elastic[key]) for variable, key in optional.items() if key in elastic}
    if elastic.get("rdzvConf"):
        values["PET_RDZV_CONF"] = ",".join(f"{pair['key']}={pair['value']}" for pair in elastic["rdzvConf"])
    return {**values, **({"PET_STANDALONE": ""} if elastic.get("standalone") else {})}


def _port(replica: Object) -> str:
    return str(
        next(port["containerPort"] for port in trainer(replica["template"])["ports"] if port.get("name") == PORT_NAME)
    )


def labels(job: Object, kind: str, index: int) -> dict[str, str]:
    """What marks the pod and the service of a replica."""
    leads = kind == "Master" or (index == 0 and "Master" not in job["spec"]["pytorchReplicaSpecs"])
    return {
        f"{LABEL}operator-name": "pytorchjob-controller",
        f"{LABEL}job-name": job["metadata"]["name"],
        f"{LABEL}replica-type": kind.lower(),
        f"{LABEL}replica-index": str(index),
        **({f"{LABEL}job-role": "master"} if leads else {}),
    }


def pod_of(job: Object, kind: str, index: int) -> Object:
    """The pod that the operator makes for a replica."""
    replica = job["spec"]["pytorchReplicaSpecs"][kind]
    pod = copy.deepcopy(replica["template"])
    metadata = pod.setdefault("metadata", {})
    metadata |= {"name": f"{job['metadata']['name']}-{kind.lower()}-{index}", "ownerReferences": [_owner(job)]}
    metadata["labels"] = {**metadata.get("labels", {}), **labels(job, kind, index)}
    pod["spec"]["restartPolicy"] = "Never" if replica["restartPolicy"] == "ExitCode" else replica["restartPolicy"]
    for container in pod["spec"]["containers"]:
        container["env"] = [
            *container.get("env", []),
            *({"name": name, "value": value} for name, value in environment(job, kind, index).items()),
        ]
    return pod


def _owner(job: Object) -> Object:
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "name": job["metadata"]["name"],
        "uid": job["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def for_a_cluster_without_network(pod: Object, meeting_port: int, index: int) -> Object:
    """A pod with what only the tests' cluster needs: all pods live on the host's network without DNS.

    So two of them must not want the same port. And they must not be told the same address: torchrun tells nodes apart
    by address and process id, which is the same in all containers.
    """
    address = f"127.0.0.{2 + index}"
    pod["spec"] |= {"hostNetwork": True, "dnsPolicy": "Default"}
    for container in pod["spec"]["containers"]:
        metrics = [port for port in container.get("ports", []) if port["name"].startswith("metrics-")]
        move = free_ports(1)[0] - min((port["containerPort"] for port in metrics), default=0)
        container["ports"] = [{**port, "containerPort": port["containerPort"] + move} for port in metrics]
        container["command"] = [_moved(word, move) for word in container.get("command", [])]
        for variable in container["env"]:
            if variable["name"] in ("MASTER_ADDR", "PET_MASTER_ADDR"):
                variable["value"] = "127.0.0.1"
            elif variable["name"] in ("MASTER_PORT", "PET_MASTER_PORT"):
                variable["value"] = str(meeting_port)
            elif variable["name"] == "PET_RDZV_ENDPOINT":
                variable["value"] = f"127.0.0.1:{meeting_port}"
            elif variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath") == "status.podIP":
                variable |= {"value": address, "valueFrom": None}
    return pod


def _moved(word: str, move: int) -> str:
    return re.sub(r"(?<=^monitoring\.port=)\d+$", lambda number: str(int(number[0]) + move), word)


def set_condition(status: Object, kind: str, holds: bool, reason: str, message: str) -> None:
    """Add a condition as the operator does: none after Failed, and Running and Restarting exclude each other."""
    conditions = status.setdefault("conditions", [])
    word, reason = str(holds), f"PyTorchJob{reason}"
    same = next((one for one in conditions if one["type"] == kind), None)
    if is_true(status, "Failed") or (same is not None and (same["status"], same["reason"]) == (word, reason)):
        return
    changed = same["lastTransitionTime"] if same is not None and same["status"] == word else now()
    excluded = {"Restarting": "Running", "Running": "Restarting"}.get(kind)
    kept = [one for one in conditions if one["type"] not in (kind, excluded)]
    if kind in ("Failed", "Succeeded"):
        kept = [{**one, "status": "False"} if one["type"] == "Running" else one for one in kept]
    status["conditions"] = [
        *kept,
        {
            "type": kind,
            "status": word,
            "reason": reason,
            "message": message,
            "lastUpdateTime": now(),
            "lastTransitionTime": changed,
        },
    ]


def is_true(status: Object, kind: str) -> bool:
    """Whether a condition holds."""
    return any(one["type"] == kind and one["status"] == "True" for one in status.get("conditions", []))


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _seconds_since(time: str) -> float:
    return (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(time)).total_seconds()


class Refused(Exception):
    """What the API server answers but success."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status


class Player:
    """A controller at work in a thread, on all namespaces, until `stop`: it does what `look` says, again and again.

    An exception of its own ends it and is kept in `failure`.
    """

    def __init__(self, node: Node, name: str) -> None:
        self._node = node
        self._pool = urllib3.PoolManager(
            ca_certs=f"{node.base}/ca.crt",
            cert_file=f"{node.base}/admin.crt",
            key_file=f"{node.base}/admin.key",
            retries=False,
            timeout=10,
        )
        self._stopped = threading.Event()
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Look at every object, and do what it asks for."""
        raise NotImplementedError

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(60)

    def ask(self, method: str, path: str, body: Object | None = None) -> Object:
        """What the server answers. Refused for anything but success."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        answer = self._pool.request(
            method,
            f"{self._node.server}/{path}",
            body=json.dumps(body) if body else None,
            headers={"Content-Type": kind},
        )
        if answer.status >= 400:
            raise Refused(answer.status, answer.data.decode(errors="replace"))
        return dict(answer.json())

    def delete_pod(self, pod: Object) -> None:
        """Tell a pod to end, unless it has been told."""
        if "deletionTimestamp" not in pod["metadata"]:
            self.ask("DELETE", f"api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}")

    def _work(self) -> None:
        while not self._stopped.wait(0.3):
            try:
                self.look()
            except HTTPError:  # the server is away
                continue
            except Refused as error:
                # Otherwise: a namespace that ends, a resource that is not there yet, a change that came in between, a
                # server that is coming up.
                if error.status not in (403, 404, 409, 429, 500, 503):
                    self.failure = traceback.format_exc()
                    return
            except Exception:
                self.failure = traceback.format_exc()
                return


class TrainingOperator(Player):
    """The training operator at work."""

    def __init__(self, node: Node) -> None:
        self._meeting_ports: dict[str, int] = {}
        super().__init__(node, "training operator")

    def look(self) -> None:
        for job in self.ask("GET", f"{GROUP}/pytorchjobs")["items"]:
            if "deletionTimestamp" not in job["metadata"]:
                self._reconcile(job)

    def _reconcile(self, job: Object) -> None:
        before = job.get("status") or {}
        status = copy.deepcopy(before)
        job = with_defaults(job)
        name, policy = job["metadata"]["name"], job["spec"]["runPolicy"]
        pods = self._pods(job)
        set_condition(status, "Created", True, "Created", f"PyTorchJob {name} is created.")
        if is_true(status, "Succeeded") or is_true(status, "Failed"):
            self._clean_up(pods, policy["cleanPodPolicy"])
        elif policy.get("suspend"):
            self._clean_up(pods, "All")
            for replica in status.get("replicaStatuses", {}).values():
                replica["active"] = 0
            if is_true(status, "Running"):
                set_condition(status, "Running", False, "Suspended", f"PyTorchJob {name} is suspended.")
            set_condition(status, "Suspended", True, "Suspended", f"PyTorchJob {name} is suspended.")
        else:
            if is_true(status, "Suspended"):
                set_condition(status, "Suspended", False, "Resumed", f"PyTorchJob {name} is resumed.")
                status["startTime"] = now()
            if not self._past_limits(job, status, pods):
                self._reconcile_replicas(job, status, pods)
        if status != before:
            self.ask(
                "PATCH",
                f"{GROUP}/namespaces/{job['metadata']['namespace']}/pytorchjobs/{name}/status",
                {"metadata": {"resourceVersion": job["metadata"]["resourceVersion"]}, "status": status},
            )

    def _pods(self, job: Object) -> list[Object]:
        selector = f"labelSelector={LABEL}job-name={job['metadata']['name']}"
        pods = self.ask("GET", f"api/v1/namespaces/{job['metadata']['namespace']}/pods?{selector}")["items"]
        return [
            pod
            for pod in pods
            if any(owner["uid"] == job["metadata"]["uid"] for owner in pod["metadata"].get("ownerReferences", []))
        ]

    def _clean_up(self, pods: list[Object], policy: str) -> None:
        for pod in pods:
            if policy == "All" or (policy == "Running" and pod["status"]["phase"] in ("Running", "Pending")):
                self.delete_pod(pod)
                try:
                    self.ask(
                        "DELETE", f"api/v1/namespaces/{pod['metadata']['namespace']}/services/{pod['metadata']['name']}"
                    )
                except Refused as error:
                    if error.status != 404:
                        raise

    def _past_limits(self, job: Object, status: Object, pods: list[Object]) -> bool:
        """Fail a job that has restarted or lasted too long."""
        policy, name = job["spec"]["runPolicy"], job["metadata"]["name"]
        limit, deadline, start = (
            policy.get("backoffLimit"),
            policy.get("activeDeadlineSeconds"),
            status.get("startTime"),
        )
        why = None
        if limit is not None:
            restarts = sum(
                container["restartCount"]
                for pod in pods
                if pod["status"]["phase"] == "Running"
                for container in pod["status"].get("containerStatuses", [])
            )
            failed = sum(pod["status"]["phase"] == "Failed" for pod in pods)
            noted = sum(replica.get("failed", 0) for replica in status.get("replicaStatuses", {}).values())
            if (restarts > 0 and restarts >= limit) or (limit == 0 and failed > noted):
                why = f"Job {name} has failed because it has reached the specified backoff limit"
        if deadline is not None and start is not None and _seconds_since(start) >= deadline:
            why = f"Job {name} has failed because it was active longer than specified deadline"
        if why is not None:
            self._clean_up(pods, "All")
            status.setdefault("completionTime", now())
            set_condition(status, "Failed", True, "Failed", why)
        return why is not None

    def _reconcile_replicas(self, job: Object, status: Object, pods: list[Object]) -> None:
        status.setdefault("startTime", now())
        for kind, replica in job["spec"]["pytorchReplicaSpecs"].items():
            counts = {
                "active": 0,
                "succeeded": 0,
                "failed": 0,
                "selector": ",".join(
                    sorted(f"{key}={value}" for key, value in labels(job, kind, 1).items() if "index" not in key)
                ),
            }
            status.setdefault("replicaStatuses", {})[kind] = counts
            by_index = {
                int(pod["metadata"]["labels"][f"{LABEL}replica-index"]): pod
                for pod in pods
                if pod["metadata"]["labels"][f"{LABEL}replica-type"] == kind.lower()
            }
            for index in sorted(by_index.keys() | set(range(replica["replicas"]))):
                if index not in by_index:
                    self._create(job, kind, index)
                elif index >= replica["replicas"]:
                    self.delete_pod(by_index[index])
                else:
                    self._look_after(job, kind, by_index[index], status)
            self._conclude(job, kind, replica, status, counts)

    def _look_after(self, job: Object, kind: str, pod: Object, status: Object) -> None:
        name, restart_policy = job["metadata"]["name"], job["spec"]["pytorchReplicaSpecs"][kind]["restartPolicy"]
        phase, counts = pod["status"]["phase"], status["replicaStatuses"][kind]
        if phase == "Failed" and restart_policy != "Never":
            ended = next(
                (
                    one["state"]["terminated"]
                    for one in pod["status"].get("containerStatuses", [])
                    if one["name"] == "pytorch" and "terminated" in one["state"]
                ),
                {"exitCode": NO_EXIT_CODE},
            )
            if restart_policy != "ExitCode" or ended["exitCode"] >= 128:
                self.delete_pod(pod)
                set_condition(
                    status,
                    "Restarting",
                    True,
                    "Restarting",
                    f"job {name} is restarting because {kind} replica(s) failed.",
                )
            else:
                set_condition(
                    status, "Failed", True, "Failed", f'job "{name}" is failing because "{kind}" replica(s) failed.'
                )
        if phase == "Running":
            counts["failed" if "deletionTimestamp" in pod["metadata"] else "active"] += 1
        elif phase in ("Succeeded", "Failed"):
            counts[phase.lower()] += 1

    def _conclude(self, job: Object, kind: str, replica: Object, status: Object, counts: Object) -> None:
        """Conditions that follow from the numbers of running, succeeded and failed replicas."""
        name, spec = job["metadata"]["name"], job["spec"]
        if kind == "Master" or "Master" not in spec["pytorchReplicaSpecs"]:
            if counts["active"]:
                set_condition(status, "Running", True, "Running", f"PyTorchJob {name} is running.")
            if counts["succeeded"] == replica["replicas"] or (
                kind == "Worker" and "elasticPolicy" in spec and counts["succeeded"]
            ):
                status.setdefault("completionTime", now())
                set_condition(status, "Succeeded", True, "Succeeded", f"PyTorchJob {name} is successfully completed.")
                return
        if counts["failed"] and replica["replicas"] > counts["succeeded"] + counts["active"]:
            what = f"because {counts['failed']} {kind} replica(s) failed."
            if replica["restartPolicy"] == "Never":
                status.setdefault("completionTime", now())
                set_condition(status, "Failed", True, "Failed", f"PyTorchJob {name} is failed {what}")
            else:
                set_condition(status, "Restarting", True, "Restarting", f"PyTorchJob {name} is restarting {what}")

    def _create(self, job: Object, kind: str, index: int) -> None:
        uid, namespace = job["metadata"]["uid"], job["metadata"]["namespace"]
        meeting_port = self._meeting_ports.setdefault(uid, free_ports(1)[0])
        pod = for_a_cluster_without_network(pod_of(job, kind, index), meeting_port, index)
        self.ask("POST", f"api/v1/namespaces/{namespace}/pods", pod)
        service = {
            "metadata": {
                "name": pod["metadata"]["name"],
                "labels": labels(job, kind, index),
                "ownerReferences": [_owner(job)],
            },
            "spec": {
                "clusterIP": "None",
                "selector": labels(job, kind, index),
                "ports": [{"name": PORT_NAME, "port": PORT}],
            },
        }
        try:
            self.ask("POST", f"api/v1/namespaces/{namespace}/services", service)
        except Refused as error:
            if error.status != 409:  # that of the pod before this one
                raise

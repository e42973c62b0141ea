"""A namespace of a Kubernetes cluster as the launcher sees it: jobs, their pods, what these say.

Every failure is a JobError with one clear line.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from job.errors import JobError
from job.launch.kubernetes.connection import TIMEOUT, Connection, Missing, Unreachable
from job.launch.kubernetes.kinds import TRAIN_JOB, Kind, kind_of, pod_index, suspension
from job.launch.kubernetes.names import LABELS, METRICS_PORT_NAME, Object

OURS = ",".join(f"{name}={value}" for name, value in LABELS.items())
RETRY_SECONDS = 5.0
KUEUE = "kueue.x-k8s.io"


@dataclass(frozen=True)
class Named:
    """What a job names, and its namespace must have."""

    claims: tuple[str, ...]
    account: str | None = None
    queue: str | None = None
    runtime: str | None = None  # a TrainingRuntime


class Cluster(Connection):
    """The namespace of a cluster, with its jobs (of both kinds), their pods, and what Kueue has made of them."""

    def _of(self, kind: Kind) -> dict[str, str]:
        return {**kind.where, "namespace": self.namespace}

    def get(self, name: str) -> Object:
        """The job called `name`. Missing without one."""
        missing: Missing | None = None
        for kind in self.kinds:
            try:
                with self.asking(f"job {name}"):
                    found = self.jobs.get_namespaced_custom_object(
                        **self._of(kind), name=name, _request_timeout=TIMEOUT
                    )
                    return dict(found)
            except Missing as error:
                missing = missing or error
        assert missing is not None
        raise missing

    def all(self, selector: str = OURS) -> list[Object]:
        """The jobs with these labels, of all kinds."""
        return [job for kind in self.kinds for job in self._list(kind, selector)["items"]]

    def _list(self, kind: Kind, selector: str) -> Object:
        with self.asking(f"list of {kind.plural}"):
            answer: Object = self.jobs.list_namespaced_custom_object(
                **self._of(kind), label_selector=selector, _request_timeout=TIMEOUT
            )
        for job in answer["items"]:  # the items of a list do not say what they are
            job["kind"], job["apiVersion"] = kind.name, kind.api_version
        return answer

    def create(self, job: Object, dry_run: bool = False) -> None:
        """Create a job; with `dry_run` the server only says whether it would."""
        options = {"field_validation": "Strict"}  # a field that is not known is an error, and not left out
        if dry_run:
            options["dry_run"] = "All"
        with self.asking(f"job {job['metadata']['name']}"):
            self.jobs.create_namespaced_custom_object(
                **self._of(kind_of(job)), body=job, _request_timeout=TIMEOUT, **options
            )

    def delete(self, job: Object) -> None:
        """Delete a job and wait until it and its pods are gone: a run has one writer at a time."""
        name = job["metadata"]["name"]
        with self.asking(f"job {name}"):
            self.jobs.delete_namespaced_custom_object(
                **self._of(kind_of(job)),
                name=name,
                body=client.V1DeleteOptions(propagation_policy="Foreground"),
                _request_timeout=TIMEOUT,
            )
        for second in itertools.count():
            try:
                self.get(name)
            except Missing:
                if not self.pods(job):
                    return
            if second == 10:
                print(f"job {name}: waiting until its pods have ended", file=sys.stderr, flush=True)
            time.sleep(1.0)

    def suspend(self, job: Object, suspended: bool, annotations: Mapping[str, str | None]) -> None:
        """Let a job's pods end, or start them again; the job stays, with these annotations (None: without them)."""
        change = suspension(kind_of(job), suspended) | {"metadata": {"annotations": dict(annotations)}}
        self._change(job, change)

    def annotate(self, job: Object, annotations: Mapping[str, str | None]) -> None:
        """Give a job these annotations; None takes one away."""
        self._change(job, {"metadata": {"annotations": dict(annotations)}})

    def _change(self, job: Object, change: Object) -> None:
        name = job["metadata"]["name"]
        with self.asking(f"job {name}"):
            self.jobs.patch_namespaced_custom_object(
                **self._of(kind_of(job)), name=name, body=change, _request_timeout=TIMEOUT
            )

    def pods(self, job: Object) -> list[Any]:
        """The pods of a job, by number."""
        name = job["metadata"]["name"]
        with self.asking(f"pods of job {name}"):
            answer = self.core.list_namespaced_pod(
                self.namespace, label_selector=f"{kind_of(job).job_label}={name}", _request_timeout=TIMEOUT
            )
        return sorted(answer.items, key=pod_index)

    def warnings(self, job: Object) -> list[Any]:
        """What the cluster has warned of concerning a job and its pods in the last hour, the oldest first.

        None where the user may not read events.
        """
        name = job["metadata"]["name"]
        try:
            with self.asking(f"events of job {name}"):
                found = self.core.list_namespaced_event(
                    self.namespace, field_selector="type=Warning", _request_timeout=TIMEOUT
                ).items
        except JobError:
            return []
        ours = [
            event
            for event in found
            if event.involved_object.name == name or event.involved_object.name.startswith(f"{name}-")
        ]
        return sorted(ours, key=lambda event: str(event.last_timestamp or event.event_time or ""))

    def workload(self, job: Object) -> Object | None:
        """What Kueue has made to queue a job; None without it."""
        if KUEUE not in self.groups:
            return None
        with self.asking(f"workload of job {job['metadata']['name']}"):
            found = self.jobs.list_namespaced_custom_object(
                KUEUE, self.groups[KUEUE], self.namespace, "workloads", _request_timeout=TIMEOUT
            )
        return next((one for one in found["items"] if job["metadata"]["uid"] in _owners(one)), None)

    def activate(self, workload: Object, active: bool) -> None:
        """Let Kueue run a workload when there is room, or keep it from doing so."""
        name = workload["metadata"]["name"]
        with self.asking(f"workload {name}"):
            self.jobs.patch_namespaced_custom_object(
                KUEUE,
                self.groups[KUEUE],
                self.namespace,
                "workloads",
                name,
                {"spec": {"active": active}},
                _request_timeout=TIMEOUT,
            )

    def log(self, pod: str, lines: int | None = None) -> str:
        """What a pod's ranks have printed; empty before it has started."""
        with self.asking(f"log of pod {pod}"):
            answer = self._log(pod, lines, _request_timeout=TIMEOUT)
            return bytes(answer.data).decode(errors="replace") if answer else ""

    def log_stream(self, pod: str, lines: int | None) -> Iterator[str]:
        """Lines of a pod's log, each after its time, as they come; none before it has started."""
        with self.asking(f"log of pod {pod}"):
            answer = self._log(pod, lines, follow=True, timestamps=True, _request_timeout=(10.0, 3600.0))
            yield from watch.watch.iter_resp_lines(answer) if answer else ()

    def _log(self, pod: str, lines: int | None, **options: Any) -> Any:
        if lines:
            options["tail_lines"] = lines
        try:
            # Not preloaded: the client would turn the bytes of a log into the text of a Python literal.
            return self.core.read_namespaced_pod_log(pod, self.namespace, **options, _preload_content=False)
        except ApiException as error:
            if error.status in (400, 404):  # not started, or gone
                return None
            raise

    def phase(self, pod: Any) -> str:
        """Phase of a pod; Gone when it is deleted, or made anew under its name."""
        with self.asking(f"pod {pod.metadata.name}"):
            found = self.core.list_namespaced_pod(
                self.namespace, field_selector=f"metadata.name={pod.metadata.name}", _request_timeout=TIMEOUT
            ).items
        return next((str(one.status.phase) for one in found if one.metadata.uid == pod.metadata.uid), "Gone")

    def metrics(self, pod: Any, path: str = "metrics") -> str | None:
        """What the endpoint of a pod's first rank answers; None when it does not (yet)."""
        first_rank = METRICS_PORT_NAME.format(rank=0)
        ports = {port.name: port.container_port for port in pod.spec.containers[0].ports or []}
        port = ports.get(first_rank)
        if port is None or pod.status.phase != "Running":
            return None
        try:
            answer = self.core.connect_get_namespaced_pod_proxy_with_path(
                f"{pod.metadata.name}:{port}", self.namespace, path, _preload_content=False, _request_timeout=(5.0, 5.0)
            )
        except (ApiException, HTTPError, OSError):
            return None
        return bytes(answer.data).decode() if answer.status == 200 else None

    def changes(self, kind: Kind, selector: str) -> Iterator[dict[str, Object]]:
        """The jobs of a kind with these labels by name: now, and again after every change.

        A watch that has expired starts anew, an absent server is waited for.
        """
        warned = False
        while True:
            try:
                with self.asking("watch of jobs"):
                    for known in self._changes_until_the_watch_ends(kind, selector):
                        warned = False
                        yield known
            except Unreachable as error:
                if not warned:
                    print(f"warning: {error}; asking again", file=sys.stderr, flush=True)
                warned = True
                time.sleep(RETRY_SECONDS)
            except JobError as error:
                # 410 Gone: the server has forgotten the version from which the watch was to go on.
                if not (isinstance(error.__cause__, ApiException) and error.__cause__.status == 410):
                    raise

    def _changes_until_the_watch_ends(self, kind: Kind, selector: str) -> Iterator[dict[str, Object]]:
        answer = self._list(kind, selector)
        known = {job["metadata"]["name"]: job for job in answer["items"]}
        yield dict(known)
        events = watch.Watch().stream(
            self.jobs.list_namespaced_custom_object,
            **self._of(kind),
            label_selector=selector,
            timeout_seconds=300,
            resource_version=answer["metadata"]["resourceVersion"],  # no change between list and watch is missed
            _request_timeout=(10.0, 330.0),
        )
        for event in events:
            job = event["object"]
            known[job["metadata"]["name"]] = job
            if event["type"] == "DELETED":
                del known[job["metadata"]["name"]]
            yield dict(known)

    def refuse_missing(self, named: Named) -> None:
        """Missing for a claim, a service account, a queue or a runtime that a job names and the namespace lacks."""
        for claim in named.claims:
            self._refuse_missing("claim", claim, self.core.read_namespaced_persistent_volume_claim)
        if named.account:
            self._refuse_missing("service account", named.account, self.core.read_namespaced_service_account)
        if named.runtime:
            self._refuse_missing_runtime(named.runtime)
        if named.queue:
            self._refuse_missing_queue(named.queue)

    def _refuse_missing_runtime(self, runtime: str) -> None:
        try:
            with self.asking(f"training runtime {runtime}"):
                self.jobs.get_namespaced_custom_object(
                    TRAIN_JOB.group,
                    TRAIN_JOB.version,
                    self.namespace,
                    "trainingruntimes",
                    runtime,
                    _request_timeout=TIMEOUT,
                )
        except Missing as error:
            raise Missing(
                f"namespace {self.namespace} has no TrainingRuntime {runtime}: kubectl apply -k k8s/runtime creates it"
            ) from error

    def _refuse_missing(self, kind: str, name: str, read: Callable[..., Any]) -> None:
        try:
            with self.asking(f"{kind} {name}"):
                read(name, self.namespace, _request_timeout=TIMEOUT)
        except Missing as error:
            raise Missing(
                f"namespace {self.namespace} has no {kind} {name}: kubectl apply -k k8s/base creates it"
            ) from error

    def _refuse_missing_queue(self, queue: str) -> None:
        with self.asking(f"queue {queue}"):
            if KUEUE not in self.groups:
                raise Missing(f"queue {queue}: the cluster has no Kueue; leave hydra.launcher.queue out")
            self.jobs.get_namespaced_custom_object(
                KUEUE,
                self.groups[KUEUE],
                self.namespace,
                "localqueues",
                queue,
                _request_timeout=TIMEOUT,
            )


def _owners(thing: Object) -> list[str]:
    return [owner["uid"] for owner in thing["metadata"].get("ownerReferences") or []]

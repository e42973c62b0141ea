"""The connection to a cluster's API server: who answers, for which namespace, and what an answer means for the user.

Every failure is a JobError with one clear line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException
from urllib3.exceptions import HTTPError

from job.errors import JobError, UserError
from job.launch.kubernetes.kinds import KINDS, Kind

NAMESPACE = "cyclevae"  # where the context names none: that of k8s/base
TIMEOUT = (10.0, 60.0)  # seconds to connect, to answer


class Unreachable(JobError):
    """The server does not answer; it may do so later."""


class Missing(JobError):
    """The cluster has no such object."""


class Connection:
    """The server of `context` and a namespace there.

    By default they are the kubeconfig's current ones; without a kubeconfig, those of the pod in which this program
    runs. UserError without any.
    """

    def __init__(self, namespace: str | None = None, context: str | None = None) -> None:
        settings = client.Configuration()
        try:
            default = _connect(settings, context)
        except ConfigException as error:
            raise UserError(
                f"no cluster: {_first_line(error)}; give a kubeconfig (KUBECONFIG, ~/.kube/config) or run in a pod"
            ) from error
        settings.retries = False  # of urllib3: otherwise it tries in silence for minutes before it says what is wrong
        connection = client.ApiClient(settings)
        self.namespace: str = namespace or default or NAMESPACE
        # Any: the client's own types allow nothing that is not spelt out.
        self.jobs: Any = client.CustomObjectsApi(connection)
        self.core: Any = client.CoreV1Api(connection)
        self._host = settings.host

    @cached_property
    def groups(self) -> dict[str, str]:
        """The groups of objects that the server knows, with the version of each that it prefers."""
        with self.asking("kinds of objects"):
            groups: Any = client.ApisApi(self.jobs.api_client).get_api_versions(_request_timeout=TIMEOUT).groups
            return {group.name: group.preferred_version.version for group in groups}

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of jobs that the server knows. Missing without any."""
        served = [kind for kind in KINDS if kind.group in self.groups]
        if not served:
            needed = " or ".join(kind.needs for kind in KINDS)
            raise Missing(f"the cluster knows neither TrainJob nor PyTorchJob: install {needed}")
        return served

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """JobError for whatever the server answers but what was asked for: Missing, Unreachable or UserError."""
        try:
            yield
        except ApiException as error:
            raise self._explained(error, what) from error
        except (HTTPError, OSError) as error:
            raise Unreachable(f"the cluster at {self._host} does not answer: {_first_line(error)}") from error

    def _explained(self, error: ApiException, what: str) -> JobError:
        """What an answer of the server means for the user, who asked for `what`."""
        try:
            answer = json.loads(error.body or "{}")
        except ValueError:  # not Kubernetes' own answer
            answer = {}
        message = str(answer.get("message") or _first_line(error.body or error.reason or "no reason given"))
        if error.status == 404:
            return self._missing(what, message, named=bool(answer.get("details")))
        if error.status == 401:
            return UserError(
                f"{what}: the cluster does not accept these credentials; log in again, or choose another --context"
            )
        if error.status == 403:
            return UserError(f"{what}: {message} (k8s/base/rbac.yaml has the rights that are needed)")
        if error.status in (429, 500, 502, 503, 504):
            return Unreachable(f"{what}: the cluster at {self._host} says {error.status}: {message}")
        return UserError(f"{what}: {message}")

    def _missing(self, what: str, message: str, named: bool) -> Missing:
        """What is missing. An answer that has not `named` an object means that the server does not know the kind."""
        if not named:
            return Missing(f"the cluster does not know this kind of object: {what}")
        if f'namespaces "{self.namespace}"' in message:
            return Missing(
                f"namespace {self.namespace} is missing: kubectl apply -k k8s/base creates one, "
                "or choose another with --namespace"
            )
        return Missing(f"{what}: {message}")


def _connect(settings: client.Configuration, context: str | None) -> str | None:
    """Fill in address and credentials; returns the namespace they come with."""
    try:
        config.load_kube_config(context=context, client_configuration=settings)
    except ConfigException:
        if context is not None:
            raise
        config.load_incluster_config(client_configuration=settings)
        return Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text().strip()
    contexts, current = config.list_kube_config_contexts()
    chosen = next(one for one in contexts if one["name"] == context) if context else current
    return chosen["context"].get("namespace")


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""The cluster that the tests use, as kubectl reaches it: their own (k8s_node.py), or one given from outside.

CYCLEVAE_TEST_KUBECONFIG: its kubeconfig, whose current context names the cluster and the tests' namespace there
CYCLEVAE_TEST_IMAGE: an image of this program that its nodes have, or can pull
CYCLEVAE_TEST_QUEUE: a LocalQueue of that namespace, for the tests with Kueue
CYCLEVAE_TEST_POD: JSON that the tests' own helper pods need beside what restricted pod security asks for
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

KUBECONFIG = "CYCLEVAE_TEST_KUBECONFIG"
# What tests leave in a namespace. Pods of jobs go with them.
LEFT_BEHIND = (
    "pytorchjobs.kubeflow.org",
    "trainjobs.trainer.kubeflow.org",
    "trainingruntimes.trainer.kubeflow.org",
    "podmonitors.monitoring.coreos.com",
    "prometheusrules.monitoring.coreos.com",
    "pods",
    "configmaps",
    "serviceaccounts",
    "roles.rbac.authorization.k8s.io",
    "rolebindings.rbac.authorization.k8s.io",
    "networkpolicies.networking.k8s.io",
)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Poll until `condition()` is true; TimeoutError naming `what`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.2)


class Access:
    """A cluster, and the environment in which kubectl reaches it.

    `directory` is of the tests; kubeconfigs for others than its administrator are written there.
    """

    given = False  # from outside: then nothing but one namespace is the tests'

    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        self.directory, self.env = directory, env

    def run(self, *command: str, check: bool = True, stdin: str | None = None, seconds: float = 120) -> str:
        """Standard output of a command; AssertionError with its error output when it fails."""
        done = subprocess.run(
            command, env=self.env, cwd=self.directory, text=True, capture_output=True, timeout=seconds, input=stdin
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def kubectl(self, *arguments: str, check: bool = True, stdin: str | None = None, seconds: float = 120) -> str:
        return self.run("kubectl", *arguments, check=check, stdin=stdin, seconds=seconds)

    def serves(self, api_version: str) -> bool:
        """Whether the server knows kinds of this group and version, such as kubeflow.org/v1."""
        return api_version in self.kubectl("api-versions").splitlines()

    def serves_group(self, group: str) -> bool:
        return any(one.startswith(f"{group}/") for one in self.kubectl("api-versions").splitlines())

    def kubeconfig_with(self, name: str, user: dict[str, str] | None = None, **cluster: str) -> Path:
        """A kubeconfig for the same cluster and namespace with other credentials, or another address."""
        config = json.loads(self.kubectl("config", "view", "--raw", "--minify", "--flatten", "--output=json"))
        if user is not None:
            config["users"][0]["user"] = user
        config["clusters"][0]["cluster"] |= cluster
        path = self.directory / name
        path.write_text(yaml.safe_dump(config))
        return path

    def idle_pod(self) -> dict[str, Any]:
        """Spec of a pod that the cluster admits, with one container, which does nothing until it is told to end."""
        raise NotImplementedError


class GivenCluster(Access):
    """A cluster that is there, with its own operators. Whatever tests make lies in one namespace, and is removed."""

    given = True

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, {**os.environ, "KUBECONFIG": os.environ[KUBECONFIG]})
        self.image = os.environ["CYCLEVAE_TEST_IMAGE"]
        self.end_jobs: Callable[[], None] = lambda: None  # that came since `swept` was entered

    @cached_property
    def namespace(self) -> str:
        """That of the kubeconfig's current context."""
        return self.kubectl("config", "view", "--minify", "--output=jsonpath={..namespace}")

    def idle_pod(self) -> dict[str, Any]:
        # The tests' own: an image that every node has is this program's.
        from job.launch.kubernetes.pods import RESTRICTED

        container = {
            "name": "main",
            "image": self.image,
            "command": ["tini", "--", "sleep", "86400"],
            "securityContext": RESTRICTED,
        }
        security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}, "fsGroup": 1000}
        own = json.loads(os.environ.get("CYCLEVAE_TEST_POD", "{}"))
        return {"securityContext": security, "terminationGracePeriodSeconds": 1, "containers": [container], **own}

    @contextlib.contextmanager
    def swept(self) -> Iterator[None]:
        """Afterwards whatever came into the namespace meanwhile is deleted."""
        before = self._inventory()
        self.end_jobs = lambda: self._delete(one for one in self._inventory() - before if not one.startswith("pod/"))
        try:
            yield
        finally:
            self._delete(self._inventory() - before)

    def _delete(self, names: Iterable[str]) -> None:
        """Delete objects, and wait until the pods of jobs have followed them."""
        for one in sorted(names):
            self.kubectl("delete", f"--namespace={self.namespace}", one, "--ignore-not-found", seconds=400)
        wait_for(lambda: len(self._pods()) == len(self._own_pods()), "the pods of jobs to be gone", 400)

    def _inventory(self) -> set[str]:
        kinds = [kind for kind in LEFT_BEHIND if "." not in kind or self.serves_group(kind.split(".", 1)[1])]
        found = self.kubectl("get", ",".join(kinds), f"--namespace={self.namespace}", "--output=name")
        return {line for line in found.splitlines() if not line.startswith("pod/")} | self._own_pods()

    def _own_pods(self) -> set[str]:
        """Pods without an owner: those of jobs go with their jobs."""
        return {f"pod/{pod['metadata']['name']}" for pod in self._pods() if not pod["metadata"].get("ownerReferences")}

    def _pods(self) -> list[dict[str, Any]]:
        answer = self.kubectl("get", "pods", f"--namespace={self.namespace}", "--output=json")
        return list(json.loads(answer)["items"])


def why_not_given() -> str | None:
    """Why the tests cannot use the cluster of CYCLEVAE_TEST_KUBECONFIG; None if they can."""
    if not Path(os.environ[KUBECONFIG]).exists():
        return f"{KUBECONFIG}={os.environ[KUBECONFIG]} is not there"
    if "CYCLEVAE_TEST_IMAGE" not in os.environ:
        return f"{KUBECONFIG} is set, but not CYCLEVAE_TEST_IMAGE: an image of this program that its nodes have"
    namespace = ["kubectl", "config", "view", "--minify", "--output=jsonpath={..namespace}"]
    env = {**os.environ, "KUBECONFIG": os.environ[KUBECONFIG]}
    if not subprocess.run(namespace, env=env, capture_output=True, text=True).stdout.strip():
        return (
            f"the current context of {KUBECONFIG} names no namespace: give one of the tests, with claims runs and data"
        )
    return None

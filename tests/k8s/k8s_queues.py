"""A LocalQueue of Kueue that can be closed and opened, on a cluster of the tests' own and on one that is there."""

from __future__ import annotations

import json

from k8s_access import GivenCluster
from k8s_node import Node
from k8s_trainer import Kueue


class Queue:
    """A queue of a namespace. While it is closed no job of it runs: those that do are evicted."""

    name: str
    words: str  # of the reason why a job waits in it while it is closed; empty where they are not known

    def close(self) -> None:
        raise NotImplementedError

    def open(self) -> None:
        raise NotImplementedError


class PlayedQueue(Queue):
    """A queue of the played Kueue: closed, it is as if there were no room."""

    name, words = "gold", "insufficient quota for cpu in flavor default"

    def __init__(self, kubernetes: Node, namespace: str) -> None:
        queue = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "metadata": {"name": self.name}}
        kubernetes.kubectl("create", f"--namespace={namespace}", "--filename=-", stdin=json.dumps(queue))
        self.kueue = Kueue(kubernetes, manages=("pytorchjobs", "trainjobs"))

    def close(self) -> None:
        self.kueue.room = False

    def open(self) -> None:
        self.kueue.room = True


class GivenQueue(Queue):
    """A queue of the real Kueue. Quotas belong to the whole cluster; whether a queue is stopped, to its namespace."""

    words = ""

    def __init__(self, kubernetes: GivenCluster, name: str) -> None:
        self.name, self._kubernetes = name, kubernetes

    def close(self) -> None:
        self._stop_policy("HoldAndDrain")

    def open(self) -> None:
        self._stop_policy("None")

    def _stop_policy(self, policy: str) -> None:
        change = json.dumps({"spec": {"stopPolicy": policy}})
        where = f"--namespace={self._kubernetes.namespace}"
        self._kubernetes.kubectl("patch", "localqueue", self.name, where, "--type=merge", f"--patch={change}")

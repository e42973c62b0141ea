"""Fixtures of the Kubernetes tests: a cluster with its operators, a namespace, and what pods said when a test fails.

The cluster is the tests' own node, on which they play the operators; or one that is there (k8s_access.GivenCluster),
where nothing is played and what it lacks is skipped by name.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_access import KUBECONFIG, Access, GivenCluster, wait_for, why_not_given
from k8s_claims import Claims, ClaimsOfTheNode, GivenClaims, recovered
from k8s_node import Node, node, unable
from k8s_operator import TrainingOperator
from k8s_queues import GivenQueue, PlayedQueue, Queue
from k8s_runs import ROOT
from k8s_trainer import Trainer, definitions

CRDS = ROOT.parent / "shared" / "crds"
GIVEN = KUBECONFIG in os.environ

_numbers = itertools.count()


def why_not() -> str | None:
    """Why the tests on a cluster are skipped; None if they are not."""
    if "CYCLEVAE_TEST_K8S" not in os.environ:
        return "minutes on a real Kubernetes: `make k8s-tools test-k8s`"
    if GIVEN:
        return why_not_given()
    if not CRDS.is_dir():
        return f"the definition of PyTorchJob is not here ({CRDS})"
    return unable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents and "kubernetes" in getattr(item, "fixturenames", ())]
    if ours and (why := why_not()):
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    one = getattr(item, "funcargs", {}).get("kubernetes")
    if isinstance(one, Access) and report.failed and one.directory.exists():  # type: ignore[attr-defined]
        report.sections.append(("Kubernetes", _state(one)))  # type: ignore[attr-defined]
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The figures of docs/reference/kubernetes.md."""
    for how, seconds in recovered:
        terminalreporter.write_line(f"{seconds:6.1f} s to the first new step: {how}")


def _state(one: Access) -> str:
    where = f"--namespace={one.namespace}" if isinstance(one, GivenCluster) else "--all-namespaces"
    said = [
        one.kubectl("get", "pytorchjobs,pods,pvc", where, "--output=wide", check=False),
        one.kubectl("get", "events", where, "--sort-by=.lastTimestamp", check=False)[-6000:],
    ]
    name = "--output=jsonpath={range .items[*]}{.metadata.namespace} {.metadata.name}{'\\n'}{end}"
    for line in one.kubectl("get", "pods", where, name, check=False).splitlines():
        namespace, pod = line.split()
        log = one.kubectl("logs", f"--namespace={namespace}", pod, "--all-containers", "--tail=40", check=False)
        said.append(f"--- {namespace}/{pod}\n{log}")
    return "\n".join(said)


@pytest.fixture(scope="session")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    """The cluster that is given, else a node that knows PyTorchJobs, whose logs are kept in pytest's directory."""
    if GIVEN:
        yield GivenCluster(tmp_path_factory.mktemp("kubernetes"))
        return
    with node(keep_logs=tmp_path_factory.getbasetemp() / "kubernetes") as one:
        define_pytorch_jobs(one)
        yield one


def define_pytorch_jobs(one: Access) -> None:
    """Make a cluster know PyTorchJobs, by the operator's own definition."""
    one.kubectl("create", "--validate=false", "--filename", str(next(CRDS.glob("kubeflow.org_pytorchjobs.*.yaml"))))
    wait_for(lambda: one.kubectl("get", "--raw", "/apis/kubeflow.org/v1/pytorchjobs", check=False), "PyTorchJobs")


@pytest.fixture
def own_node(kubernetes: Access) -> Node:
    """The cluster, for tests that do to its server what only they may who own it."""
    if not isinstance(kubernetes, Node):
        pytest.skip("needs a cluster of the tests' own: its API server is killed")
    return kubernetes


@pytest.fixture(scope="session")
def operator(kubernetes: Access) -> Iterator[None]:
    """The training operator, played where the cluster is the tests' own."""
    if not isinstance(kubernetes, Node):
        if not kubernetes.serves_group("kubeflow.org"):
            pytest.skip("the cluster lacks Kubeflow's training operator")
        yield
        return
    one = TrainingOperator(kubernetes)
    yield
    one.stop()
    assert one.failure is None, one.failure


def define(kubernetes: Access, group_version: str) -> list[str]:
    """Make a cluster know the kinds of a group; returns the names of their definitions."""
    objects = definitions(group_version)
    kubernetes.kubectl("create", "--filename=-", stdin=yaml.safe_dump_all(objects))
    for one in objects:
        plural = one["spec"]["names"]["plural"]
        kubernetes.kubectl("wait", "--for=condition=Established", f"crd/{one['metadata']['name']}", "--timeout=60s")
        path = f"/apis/{group_version}/{plural}"
        wait_for(lambda: kubernetes.kubectl("get", "--raw", path, check=False), plural)  # noqa: B023
    return [one["metadata"]["name"] for one in objects]


@contextlib.contextmanager
def defined(kubernetes: Access, group_version: str) -> Iterator[None]:
    """The kinds of a group while a test needs them: others are of a cluster without."""
    names = define(kubernetes, group_version)
    yield
    kubernetes.kubectl("delete", "crd", *names)


@pytest.fixture
def train_jobs(kubernetes: Access) -> Iterator[None]:
    """Kubeflow Trainer, played where the cluster is the tests' own."""
    if not isinstance(kubernetes, Node):
        if not kubernetes.serves_group("trainer.kubeflow.org"):
            pytest.skip("the cluster lacks Kubeflow Trainer 2")
        yield
        return
    with defined(kubernetes, "trainer.kubeflow.org/v1alpha1"):
        one = Trainer(kubernetes)
        yield
        one.stop()
    assert one.failure is None, one.failure


@pytest.fixture
def queue(kubernetes: Access, namespace: str) -> Iterator[Queue]:
    """A queue of Kueue, which is played where the cluster is the tests' own."""
    if isinstance(kubernetes, GivenCluster):
        if not kubernetes.serves_group("kueue.x-k8s.io"):
            pytest.skip("the cluster lacks Kueue")
        if "CYCLEVAE_TEST_QUEUE" not in os.environ:
            pytest.skip("CYCLEVAE_TEST_QUEUE names no LocalQueue of the namespace")
        given = GivenQueue(kubernetes, os.environ["CYCLEVAE_TEST_QUEUE"])
        yield given
        given.open()
        return
    assert isinstance(kubernetes, Node)
    with defined(kubernetes, "kueue.x-k8s.io/v1beta1"):
        one = PlayedQueue(kubernetes, namespace)
        yield one
        one.kueue.stop()
    assert one.kueue.failure is None, one.kueue.failure


@pytest.fixture
def namespace(kubernetes: Access, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own; that of a cluster that is given is cleared of what the test leaves."""
    if isinstance(kubernetes, GivenCluster):
        with kubernetes.swept():
            yield kubernetes.namespace
        return
    name = f"{re.sub('[^a-z0-9]+', '-', request.node.name.lower())[:50]}-{next(_numbers)}"
    kubernetes.kubectl("create", "namespace", name)
    yield name
    kubernetes.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def image(kubernetes: Access) -> None:
    """The image of the tests (k8s_runs.IMAGE) where the cluster's nodes find it."""
    if isinstance(kubernetes, Node):
        load_image(kubernetes)


def load_image(one: Node) -> None:
    """Build the image, and load it into the node's dockerd."""
    one.run(sys.executable, str(ROOT / "tests" / "image" / "build.py"), "--load", seconds=1500)


@pytest.fixture
def claims(kubernetes: Access, namespace: str, tmp_path: Path) -> Iterator[Claims]:
    """The claims of the test's namespace."""
    if isinstance(kubernetes, Node):
        own = ClaimsOfTheNode(kubernetes, namespace, tmp_path)
        own.apply()
        yield own
        return
    assert isinstance(kubernetes, GivenCluster)
    given = GivenClaims(kubernetes)
    given.refuse_taken("slow", "sweep", "long", "both", "one", "calm", "cpu-demo", "killed", "frozen", "queued")
    yield given
    given.remove_new()


@pytest.fixture
def overlay_claims(own_node: Node, tmp_path: Path) -> Iterator[ClaimsOfTheNode]:
    """The claims of the namespace cyclevae, which a test makes from k8s/base, from nothing."""
    volumes = ("persistentvolume/cyclevae-runs", "persistentvolume/cyclevae-data")
    own_node.kubectl("delete", "namespace/cyclevae", "priorityclass/cyclevae", "--ignore-not-found")
    yield ClaimsOfTheNode(own_node, "cyclevae", tmp_path)
    own_node.kubectl("delete", "namespace", "cyclevae")  # others apply overlays to it
    own_node.kubectl("delete", *volumes)

"""Fixtures of the Kubernetes tests: a node, the operator on it, namespaces, and what pods said when a test fails."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from k8s_node import Node, node, unable, wait_for
from k8s_operator import TrainingOperator
from k8s_runs import ROOT, Claims
from k8s_trainer import Kueue, Trainer, definitions

CRDS = ROOT.parent / "shared" / "crds"

_numbers = itertools.count()


def why_not() -> str | None:
    """Why the tests on a cluster are skipped; None if they are not."""
    if "CYCLEVAE_TEST_K8S" not in os.environ:
        return "minutes on a real Kubernetes: `make k8s-tools test-k8s`"
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
    if isinstance(one, Node) and report.failed and one.base.exists():  # type: ignore[attr-defined]
        report.sections.append(("Kubernetes", _state(one)))  # type: ignore[attr-defined]
    return report


def _state(one: Node) -> str:
    said = [
        one.kubectl("get", "pytorchjobs,pods,pvc,nodes", "--all-namespaces", "--output=wide", check=False),
        one.kubectl("get", "events", "--all-namespaces", "--sort-by=.lastTimestamp", check=False)[-6000:],
    ]
    for line in one.kubectl("get", "pods", "--all-namespaces", "--no-headers", check=False).splitlines():
        namespace, pod = line.split()[:2]
        said.append(
            f"--- {namespace}/{pod}\n"
            + one.kubectl("logs", f"--namespace={namespace}", pod, "--all-containers", "--tail=40", check=False)
        )
    return "\n".join(said)


@pytest.fixture(scope="session")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that knows PyTorchJobs. Logs of its daemons are kept in pytest's directory."""
    with node(keep_logs=tmp_path_factory.getbasetemp() / "kubernetes") as one:
        one.kubectl("create", "--validate=false", "--filename", str(next(CRDS.glob("kubeflow.org_pytorchjobs.*.yaml"))))
        wait_for(lambda: one.kubectl("get", "--raw", "/apis/kubeflow.org/v1/pytorchjobs", check=False), "PyTorchJobs")
        yield one


@pytest.fixture(scope="session")
def operator(kubernetes: Node) -> Iterator[TrainingOperator]:
    """The training operator, played."""
    one = TrainingOperator(kubernetes)
    yield one
    one.stop()
    assert one.failure is None, one.failure


@contextlib.contextmanager
def defined(kubernetes: Node, group_version: str) -> Iterator[None]:
    """The kinds of a group while a test needs them: others are of a cluster without."""
    objects = definitions(group_version)
    kubernetes.kubectl("create", "--filename=-", stdin=yaml.safe_dump_all(objects))
    for one in objects:
        plural = one["spec"]["names"]["plural"]
        kubernetes.kubectl("wait", "--for=condition=Established", f"crd/{one['metadata']['name']}", "--timeout=60s")
        path = f"/apis/{group_version}/{plural}"
        wait_for(lambda: kubernetes.kubectl("get", "--raw", path, check=False), plural)  # noqa: B023
    yield
    kubernetes.kubectl("delete", "crd", *(one["metadata"]["name"] for one in objects))


@pytest.fixture
def train_jobs(kubernetes: Node) -> Iterator[Trainer]:
    """Kubeflow Trainer, played."""
    with defined(kubernetes, "trainer.kubeflow.org/v1alpha1"):
        one = Trainer(kubernetes)
        yield one
        one.stop()
    assert one.failure is None, one.failure


@pytest.fixture
def kueue(kubernetes: Node) -> Iterator[Kueue]:
    """Kueue, played; it manages PyTorchJobs."""
    with defined(kubernetes, "kueue.x-k8s.io/v1beta1"):
        one = Kueue(kubernetes, manages=("pytorchjobs",))
        yield one
        one.stop()
    assert one.failure is None, one.failure


@pytest.fixture
def namespace(kubernetes: Node, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own."""
    name = f"{re.sub('[^a-z0-9]+', '-', request.node.name.lower())[:50]}-{next(_numbers)}"
    kubernetes.kubectl("create", "namespace", name)
    yield name
    kubernetes.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def image(kubernetes: Node) -> None:
    """The image of the tests (k8s_runs.IMAGE) in the node's dockerd."""
    kubernetes.run(sys.executable, str(ROOT / "tests" / "image" / "build.py"), "--load", seconds=1500)


@pytest.fixture
def claims(kubernetes: Node, namespace: str, tmp_path: Path) -> Claims:
    one = Claims(kubernetes, namespace, tmp_path)
    one.apply()
    return one

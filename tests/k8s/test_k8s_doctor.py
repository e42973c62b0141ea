"""What `cyclevae doctor --k8s` says of a real API server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from k8s_node import Node

from job.doctor import main
from job.launch.kubernetes import health
from job.launch.kubernetes.cluster import Cluster
from job.launch.kubernetes.health import kinds_check

pytest_plugins = ["k8s_lab"]
LOCATION = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"  # the variable KUBECONFIG, as read on import


def examined(namespace: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    code = main(["--k8s", "--namespace", namespace, "--json"])
    return code, {check["name"]: check for check in json.loads(capsys.readouterr().out)}


def test_access_kinds_and_rights(
    kubernetes: Node,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(LOCATION, kubernetes.env["KUBECONFIG"])
    code, checks = examined(namespace, capsys)
    assert checks["access"]["words"] == f"the API server answers; namespace {namespace}"
    assert "PyTorchJob" in checks["kinds"]["words"]
    assert checks["PyTorchJob"]["state"] == checks["rights"]["state"] == "well"
    claims = {checks["runs claim"]["state"], checks["data claim"]["state"]}
    assert code == ("trouble" in {check["state"] for check in checks.values()})
    assert claims <= {"well", "trouble"}

    code, checks = examined("nobody-made-this", capsys)
    assert code == 1
    assert checks["runs claim"]["state"] == "trouble"

    # The same server for a user without rights.
    def as_nobody(*where: str | None) -> Cluster:
        cluster = Cluster(*where)
        cluster.core.api_client.set_default_header("Impersonate-User", f"system:serviceaccount:{namespace}:nobody")
        return cluster

    monkeypatch.setattr(health, "Cluster", as_nobody)
    code, checks = examined(namespace, capsys)
    assert code == 1
    assert checks["PyTorchJob"]["state"] == checks["rights"]["state"] == "trouble"
    assert "not allowed: create pytorchjobs" in checks["rights"]["words"]


def test_a_server_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LOCATION, str(tmp_path / "none"))
    code, checks = examined("ns", capsys)
    assert code == 1
    assert checks["access"]["state"] == "trouble"
    cluster = {"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    config = {
        "current-context": "c",
        "clusters": [cluster],
        "contexts": [context],
        "users": [{"name": "u", "user": {}}],
    }
    (tmp_path / "config").write_text(json.dumps(config))
    monkeypatch.setattr(LOCATION, str(tmp_path / "config"))
    code, checks = examined("ns", capsys)
    assert "does not answer" in checks["access"]["words"]


def test_a_cluster_without_operators() -> None:
    check = kinds_check({"apps": "v1"})
    assert check.state == "trouble"
    assert check.remedy == "install Kubeflow Trainer 2 or Kubeflow's training operator 1.9"

"""The manifests in k8s/ and those that the launcher sends: valid, from one place, and consistent with the trainer."""

from __future__ import annotations

import copy
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from generate import OVERLAYS, files
from schemas import ROOT, needs_crds, problems

from generate_monitoring import PORTS, pod_monitor
from job.errors import ExitCode, UserError
from job.launch.kubernetes.kinds import PYTORCH_JOB, TRAIN_JOB, Kind
from job.launch.kubernetes.manifests import job_of, pytorch_job, training_runtime
from job.launch.kubernetes.names import STOP_ANNOTATION
from job.launch.kubernetes.pods import LaunchedRun
from job.launch.kubernetes.settings import ContainerSettings, Settings

RUN = LaunchedRun("first", "/runs/first", ["--config-name", "demo"])
SETTINGS = Settings(container=ContainerSettings("image:1"))


def render(directory: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl to render with")
    done = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def pods_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a job or runtime."""
    if manifest["kind"] == "PyTorchJob":
        return [replica["template"] for replica in manifest["spec"]["pytorchReplicaSpecs"].values()]
    if manifest["kind"] == "TrainingRuntime":
        return [job["template"]["spec"]["template"] for job in manifest["spec"]["template"]["spec"]["replicatedJobs"]]
    return []


def variables(container: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


@pytest.mark.parametrize("path", sorted(files()))
def test_generated_files_are_up_to_date(path: str) -> None:
    assert (ROOT / path).read_text() == files()[path], "run: python k8s/generate.py"


def test_every_overlay_is_generated() -> None:
    assert {path.name for path in (ROOT / "k8s" / "overlays").iterdir()} == set(OVERLAYS)


@pytest.mark.parametrize("name", ["trainjob", "trainjob-kueue"])
def test_a_job_comes_after_its_runtime_and_both_after_the_namespace(name: str) -> None:
    """Trainer refuses a job without its runtime, and copies the runtime when the job is made."""
    kinds = [one["kind"] for one in render(ROOT / "k8s" / "overlays" / name)]
    assert kinds.index("Namespace") < kinds.index("TrainingRuntime") < kinds.index("TrainJob")


def test_what_the_server_would_add_to_the_network_policy_is_there() -> None:
    """Otherwise `kubectl apply` finds a difference every time."""
    (policy,) = yaml.safe_load_all((ROOT / "k8s" / "base" / "networkpolicy.yaml").read_text())
    rules = [*policy["spec"]["ingress"], *policy["spec"]["egress"]]
    assert all("protocol" in port for rule in rules for port in rule.get("ports", []))


@needs_crds
@pytest.mark.parametrize("name", sorted(OVERLAYS))
def test_an_overlay_renders_and_is_valid(name: str) -> None:
    manifests = render(ROOT / "k8s" / "overlays" / name)
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod["spec"]}
        for one in manifests
        for pod in pods_of(one)
    ]
    assert pods
    assert [problem for manifest in [*manifests, *pods] for problem in problems(manifest)] == []
    assert {
        manifest["metadata"].get("namespace")
        for manifest in manifests
        if manifest["kind"] not in ("Namespace", "PriorityClass")
    } == {"cyclevae"}
    named = {container["image"] for pod in pods for container in pod["spec"]["containers"]}
    assert named == {"registry.example/cyclevae:0.1.0"}


@needs_crds
@pytest.mark.parametrize("overlay", ["elastic", "trainjob"])
def test_components_render_on_top(overlay: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    path = tmp_path / "k8s" / "overlays" / overlay / "kustomization.yaml"
    path.write_text(path.read_text().replace("# components:", "components:").replace("# - ../", "- ../"))
    manifests = render(path.parent)
    assert {problem.split(":")[1] for manifest in manifests for problem in problems(manifest)} == {
        " no schema of monitoring.coreos.com/v1 PodMonitor",
        " no schema of monitoring.coreos.com/v1 PrometheusRule",
    }
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    described = by_kind["PyTorchJob" if overlay == "elastic" else "TrainingRuntime"]
    (container,) = pods_of(described)[0]["spec"]["containers"]
    assert variables(container)["NCCL_IB_HCA"] == "mlx5"
    resources = container["resources"] if overlay == "elastic" else resources_per_node(by_kind["TrainJob"])
    for amounts in (resources["limits"], resources["requests"]):
        assert amounts["rdma/ib"] == "1"


def resources_per_node(job: dict[str, Any]) -> dict[str, Any]:
    """What the nodes of a TrainJob are given, in the form of a container's resources."""
    resources: dict[str, Any] = job["spec"]["trainer"]["resourcesPerNode"]
    return resources


@pytest.mark.parametrize("kind", [PYTORCH_JOB, TRAIN_JOB])
def test_other_devices_of_a_node(kind: Kind) -> None:
    job = job_of(kind, RUN, replace(SETTINGS, gpus_per_node=8, resources={"rdma/ib": 2}))
    resources = resources_per_node(job) if kind is TRAIN_JOB else pods_of(job)[0]["spec"]["containers"][0]["resources"]
    assert resources == {name: {"nvidia.com/gpu": "8", "rdma/ib": "2"} for name in ("requests", "limits")}


@needs_crds
def test_validation_finds_what_is_wrong() -> None:
    job = pytorch_job(RUN, SETTINGS)
    assert problems(job) == []
    assert "replicas" in " ".join(problems({**job, "spec": {**job["spec"], "replicas": 1}}))
    broken = copy.deepcopy(job)
    pods_of(broken)[0]["spec"]["containers"][0]["livenessProbe"]["httpget"] = {}
    assert "httpget" in " ".join(problems(broken))
    assert "no schema" in " ".join(problems({**job, "kind": "PyTorchJobs"}))
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "runs"},
        "spec": {"accessMode": ["ReadWriteMany"]},
    }
    assert "accessMode" in " ".join(problems(claim))


def generated(name: str) -> list[dict[str, Any]]:
    """The generated objects of an overlay, the runtime of a TrainJob among them."""
    kind, _, _ = OVERLAYS[name]
    paths = [f"k8s/overlays/{name}/job.yaml", *(["k8s/runtime/runtime.yaml"] if kind is TRAIN_JOB else [])]
    return [one for path in paths for one in yaml.safe_load_all((ROOT / path).read_text())]


@pytest.mark.parametrize("name", sorted(OVERLAYS))
def test_grace_times_are_in_order(name: str) -> None:
    """Kubernetes kills after torchrun would, and torchrun after a step and a save have had their time."""
    manifests = generated(name)
    (annotations,) = (one["metadata"]["annotations"] for one in manifests if "annotations" in one["metadata"])
    needed = int(annotations[STOP_ANNOTATION])
    for pod in (pod for one in manifests for pod in pods_of(one)):
        torchrun = int(variables(pod["spec"]["containers"][0])["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
        assert pod["spec"]["terminationGracePeriodSeconds"] > torchrun > needed >= 60


def assert_restricted(spec: dict[str, Any]) -> None:
    """Hold a pod's spec to what restricted pod security, which the namespace enforces, asks for."""
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_the_pod_for_files_is_valid_and_restricted() -> None:
    (pod,) = render(ROOT / "k8s" / "shell")
    assert problems(pod) == []
    assert_restricted(pod["spec"])
    (container,) = pod["spec"]["containers"]
    assert container["image"] == "registry.example/cyclevae:0.1.0"


@pytest.mark.parametrize("name", sorted(OVERLAYS))
def test_pods_pass_restricted_security_and_show_their_metrics(name: str) -> None:
    _, settings, _ = OVERLAYS[name]
    (pod,) = [pod for one in generated(name) for pod in pods_of(one)]
    spec = pod["spec"]
    assert_restricted(spec)
    monitored = pod_monitor()["spec"]
    assert monitored["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (trainer,) = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in trainer["ports"]}
    assert {f"metrics-{rank}": 9400 + rank for rank in range(settings.tasks)}.items() <= ports.items()
    assert settings.tasks <= PORTS
    assert any("monitoring.port=9400" in (ROOT / path).read_text() for path in files() if f"/{name}/" in path)


def test_one_node_is_a_master_and_several_are_workers_that_nothing_keeps_from_finding_each_other() -> None:
    """DNS has the names of ready pods alone: what delays readiness would delay the rendezvous, and so readiness."""
    one, several = (
        pytorch_job(RUN, SETTINGS)["spec"],
        pytorch_job(RUN, Settings(nodes=4, min_nodes=2, container=ContainerSettings("image:1")))["spec"],
    )
    assert list(one["pytorchReplicaSpecs"]) == ["Master"]
    assert "elasticPolicy" not in one
    assert list(several["pytorchReplicaSpecs"]) == ["Worker"]
    assert several["elasticPolicy"] == {
        "rdzvBackend": "c10d",
        "rdzvId": "first",
        "minReplicas": 2,
        "maxReplicas": 4,
        "maxRestarts": 0,
        "rdzvConf": [{"key": "join_timeout", "value": "1800"}],
    }
    (alone,), (worker,) = (
        one["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"],
        several["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"],
    )
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= alone.keys()
    assert not {"startupProbe", "readinessProbe"} & worker.keys()
    assert worker["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics-0"}
    assert variables(worker)["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    probe = worker["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > 300, "training.sick_rank_timeout_seconds comes first"


def test_exit_codes_decide_on_a_restart() -> None:
    """ExitCode retries from 128 on; a Job under Trainer v2 is told the codes."""
    (replica,) = pytorch_job(RUN, SETTINGS)["spec"]["pytorchReplicaSpecs"].values()
    assert replica["restartPolicy"] == "ExitCode"
    assert {code for code in ExitCode if code >= 128} == {ExitCode.RETRY, ExitCode.STOPPED}
    runtime = training_runtime("cyclevae", SETTINGS, 8)
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    told = {
        code: rule["action"]
        for rule in job["template"]["spec"]["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {"values": []})["values"]
    }
    assert told == {1: "FailJob", 2: "FailJob", 134: "Ignore", 143: "Ignore"}


def test_settings_reach_the_pod() -> None:
    settings = Settings(
        gpus_per_node=8,
        cpus_per_task=4,
        mem_gb=100,
        shm_gb=16,
        queue="gold",
        node_selector={"gpu": "h200"},
        fs_group=None,
        container=ContainerSettings("image:1", pull_secrets=["registry"], env={"NCCL_DEBUG": "INFO"}),
        pod={"runtimeClassName": "nvidia", "securityContext": {"runAsUser": 7}},
    )
    job = pytorch_job(RUN, settings)
    spec = pods_of(job)[0]["spec"]
    (container,) = spec["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "32", "memory": "100Gi", "nvidia.com/gpu": "8"},
        "limits": {"memory": "100Gi", "nvidia.com/gpu": "8"},
    }
    assert variables(container)["NCCL_DEBUG"] == "INFO"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["nodeSelector"] == {"gpu": "h200"}
    assert spec["runtimeClassName"] == "nvidia"
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
        "runAsUser": 7,
    }
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in spec["volumes"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gold"
    assert job["spec"]["runPolicy"]["suspend"], "Kueue starts it"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(), "container.image"),
        (Settings(nodes=2, min_nodes=3, container=ContainerSettings("i")), "min_nodes=3"),
        (Settings(nodes=0, container=ContainerSettings("i")), "nodes=0"),
        (Settings(max_restarts=-1, container=ContainerSettings("i")), "max_restarts=-1"),
    ],
)
def test_impossible_settings(settings: Settings, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pytorch_job(RUN, settings)

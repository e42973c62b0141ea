"""hydra/launcher=pytorchjob and `cyclevae k8s` as far as no cluster is needed: what is sent, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from schemas import needs_crds, problems

from job import k8s
from job.command import composed
from job.errors import UserError
from job.launch.kubernetes.connection import Missing
from job.launch.kubernetes.kinds import PYTORCH_JOB
from job.launch.kubernetes.names import DIGEST_ANNOTATION, RUN_ANNOTATION, SWEEP_LABEL, job_name, named_job
from job.launch.kubernetes.settings import Settings
from job.launch.kubernetes.sweep import named_by

Manifests = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def submit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """What `cyclevae k8s submit --dry-run ARGUMENTS...` prints."""

    def dry_run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["cyclevae"])
        monkeypatch.chdir(tmp_path)
        needed = ["data=synthetic", "logging.run_name=r", "hydra.launcher.container.image=image:1"]
        if not any(argument.startswith("hydra.launcher.kind=") for argument in arguments):
            needed.append("hydra.launcher.kind=pytorchjob")
        assert k8s.main(["submit", "--dry-run", *needed, *arguments]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return dry_run


@pytest.fixture
def manifests(submit: Callable[..., str]) -> Manifests:
    return lambda *arguments: list(yaml.safe_load_all(submit(*arguments)))


def trainer(job: dict[str, Any]) -> dict[str, Any]:
    (replica,) = job["spec"]["pytorchReplicaSpecs"].values()
    (container,) = replica["template"]["spec"]["containers"]
    return container


def test_a_run_is_a_job_of_its_name(manifests: Manifests) -> None:
    (job,) = manifests("hydra.launcher.gpus_per_node=8", "+hydra.launcher.container.env.NCCL_DEBUG=INFO")
    assert job["metadata"]["name"] == "r"
    assert job["metadata"]["annotations"][RUN_ANNOTATION] == "/runs/r"
    assert job["spec"]["nprocPerNode"] == "8"
    assert trainer(job)["command"] == [
        "tini",
        "--",
        "python",
        "-m",
        "job.launch.kubernetes.attempt",
        "/runs/r",
        "5",
        "--",
        "--standalone",
        "-m",
        "job.train",
        "--config-name",
        "mmdit_cycle_vae",
        "data=synthetic",
        "logging.run_name=r",
        "hydra.run.dir='/runs/r'",
        "monitoring.port=9400",
    ]
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in trainer(job)["env"]


@needs_crds
def test_a_train_job_is_small_and_valid(manifests: Manifests) -> None:
    """Everything that is the same for all runs is in the runtime."""
    (job,) = manifests(
        "hydra.launcher.kind=trainjob",
        "hydra.launcher.nodes=2",
        "hydra.launcher.gpus_per_node=8",
        "hydra.launcher.mem_gb=64",
        "+hydra.launcher.node_selector.gpu=h200",
        "hydra.launcher.queue=gold",
        "+hydra.launcher.container.env.NCCL_DEBUG=INFO",
    )
    assert problems(job) == []
    assert (job["kind"], job["metadata"]["name"]) == ("TrainJob", "r")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gold"
    spec = job["spec"]
    assert (spec["suspend"], spec["runtimeRef"]) == (True, {"kind": "TrainingRuntime", "name": "cyclevae"})
    run = spec["trainer"]
    assert (run["numNodes"], run["numProcPerNode"], run["image"]) == (2, 8, "image:1")
    assert run["resourcesPerNode"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "8"}
    assert run["command"][4:7] == ["job.launch.kubernetes.attempt", "/runs/r", "5"]
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in run["env"]
    (patch,) = spec["runtimePatches"]
    (nodes,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert nodes["template"]["spec"]["template"]["spec"]["nodeSelector"] == {"gpu": "h200"}


@needs_crds
def test_jobs_are_valid(manifests: Manifests) -> None:
    (job,) = manifests("hydra.launcher.gpus_per_node=8", "+hydra.launcher.container.env.NCCL_DEBUG=INFO")
    assert problems(job) == []


STORE = ["data=shards", "data.dir=s3://bucket/mine"]
SECRETS = [
    f"+hydra.launcher.container.secrets.{name}" for name in ("AWS_ACCESS_KEY_ID=s3", "AWS_SECRET_ACCESS_KEY=s3/key")
]


@pytest.mark.parametrize("kind", ["pytorchjob", "trainjob"])
def test_data_of_a_store_and_who_asks_for_it(manifests: Manifests, kind: str) -> None:
    (job,) = manifests(f"hydra.launcher.kind={kind}", *STORE, "data.cache_dir=/tmp/data", *SECRETS)
    container = job["spec"]["trainer"] if kind == "trainjob" else trainer(job)
    overrides = [word for word in container["command"] if word.startswith("data.")]
    data = composed("mmdit_cycle_vae", overrides).data  # Hydra writes the colon its own way
    assert (data.dir, data.cache_dir) == ("s3://bucket/mine", "/tmp/data")
    from_secrets = [variable for variable in container["env"] if "valueFrom" in variable]
    assert from_secrets[:2] == [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": "s3", "key": key}}}
        for name, key in (("AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"), ("AWS_SECRET_ACCESS_KEY", "key"))
    ]


@needs_crds
@pytest.mark.parametrize(("kind", "claim"), [("pytorchjob", "data"), ("pytorchjob", "null"), ("trainjob", "data")])
def test_jobs_on_data_of_a_store_are_valid(manifests: Manifests, kind: str, claim: str) -> None:
    where = [f"hydra.launcher.kind={kind}", f"hydra.launcher.data_claim={claim}", "data.cache_dir=data/cache"]
    (job,) = manifests(*where, *STORE, *SECRETS)
    assert problems(job) == []


@pytest.mark.parametrize(
    ("cache", "claim", "read_only"),
    [
        ("/tmp/data", "data", True),
        ("runs/cache", "data", True),
        ("data/cache", "data", False),
        ("/data/cache", "null", False),
    ],
)
def test_where_data_of_a_store_is_copied_can_be_written(
    manifests: Manifests, cache: str, claim: str, read_only: bool
) -> None:
    (job,) = manifests(*STORE, f"data.cache_dir={cache}", f"hydra.launcher.data_claim={claim}")
    mounts = {mount["mountPath"]: mount for mount in trainer(job)["volumeMounts"]}
    assert mounts["/data"] == {"name": "data", "mountPath": "/data", "readOnly": read_only}
    assert not any(mounts[place].get("readOnly") for place in ("/tmp", "/runs"))
    (replica,) = job["spec"]["pytorchReplicaSpecs"].values()
    volumes = {volume["name"]: volume for volume in replica["template"]["spec"]["volumes"]}
    assert volumes["tmp"] == {"name": "tmp", "emptyDir": {}}
    expected = {"emptyDir": {}} if claim == "null" else {"persistentVolumeClaim": {"claimName": "data"}}
    assert volumes["data"] == {"name": "data", **expected}


def test_a_claim_that_no_pod_mounts_need_not_be_there() -> None:
    assert named_by(PYTORCH_JOB, Settings(data_claim=None)).claims == ("runs",)
    assert named_by(PYTORCH_JOB, Settings()).claims == ("runs", "data")


def test_a_sweep_is_a_job_per_point_named_after_what_varies(manifests: Manifests) -> None:
    jobs = manifests("loss.cycle_text_weight=0.05,0.1,0.2", "training.seed=1", "hydra.launcher.nodes=2")
    assert [job["metadata"]["annotations"][RUN_ANNOTATION] for job in jobs] == [
        f"/runs/r/loss.cycle_text_weight={weight}" for weight in ("0.05", "0.1", "0.2")
    ]
    assert len({job["metadata"]["name"] for job in jobs}) == 3
    assert {job["metadata"]["labels"][SWEEP_LABEL] for job in jobs} == {"r"}
    assert "loss.cycle_text_weight=0.1" in trainer(jobs[1])["command"]
    again = manifests("training.seed=1", "hydra.launcher.nodes=2", "loss.cycle_text_weight=0.1,0.3")
    assert again[0]["metadata"]["name"] == jobs[1]["metadata"]["name"], "the same point finds its own job"


def test_other_settings_are_noticed(manifests: Manifests) -> None:
    digests = {
        manifests(*arguments)[0]["metadata"]["annotations"][DIGEST_ANNOTATION]
        for arguments in ([], ["training.seed=1"], ["hydra.launcher.mem_gb=4"], [])
    }
    assert len(digests) == 3


def test_metrics_where_the_user_wants_them(manifests: Manifests) -> None:
    (job,) = manifests("monitoring.port=8000")
    assert {"name": "metrics-0", "containerPort": 8000} in trainer(job)["ports"]
    (job,) = manifests("monitoring.enabled=false")
    assert "livenessProbe" not in trainer(job)
    assert not any("monitoring.port" in word for word in trainer(job)["command"])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["loss.cycle_text_weigh=1"], 2, "did you mean loss.cycle_text_weight"),
        (["hydra.launcher.gpu=1"], 2, "gpu"),
        (["training.num_train_steps=-1,5"], 1, "training.num_train_steps=-1"),
        (["training.seed=1,1"], 1, "two points"),
        (["hydra.launcher.container.image=null"], 1, "hydra.launcher.container.image"),
        (["hydra.launcher.min_nodes=2"], 1, "hydra.launcher.min_nodes=2"),
        (["hydra.launcher.kind=mpijob"], 1, "hydra.launcher.kind=mpijob: choose one of auto, trainjob, pytorchjob"),
        (
            ["hydra.launcher.kind=trainjob", "hydra.launcher.nodes=2", "hydra.launcher.min_nodes=1"],
            1,
            "min_nodes=1 needs",
        ),
        (["hydra.launcher.kind=trainjob", "hydra.launcher.start_min=5"], 1, "takes it from its TrainingRuntime"),
        (["hydra.launcher.kind=trainjob", "+hydra.launcher.pod.hostIPC=true"], 1, "hydra.launcher.pod.hostIPC"),
        (["hydra.launcher.kind=trainjob", "hydra.launcher.data_claim=null"], 1, "hydra.launcher.data_claim=null: a Tr"),
        (
            ["hydra.launcher.nodes=2", "training.global_batch_size=32", "training.train_batch_size=32"],
            1,
            "on 2 nodes of 1: training.global_batch_size=32 is not a multiple",
        ),
        (
            [
                "hydra.launcher.nodes=3",
                "hydra.launcher.min_nodes=1",
                "training.global_batch_size=12",
                "training.train_batch_size=2",
                "hydra.launcher.tasks_per_node=3",
            ],
            1,
            "on 3 nodes of 3:",
        ),
        (["logging.save_dir=results"], 1, "logging.save_dir=results is not on the claim"),
        (["data=shards", "data.dir=elsewhere/mine"], 1, "data.dir=elsewhere/mine is not on the claim"),
        (["data=shards", "data.dir=s3://b/d"], 1, "set data.cache_dir"),
        (
            ["data=shards", "data.dir=s3://b/d", "data.cache_dir=/local"],
            1,
            "data.cache_dir=/local: pods can write below /tmp, /data, /runs alone",
        ),
        (
            ["data=shards", "data.dir=data/mine", "hydra.launcher.data_claim=null"],
            1,
            "hydra.launcher.data_claim=null: pods have nothing at data.dir=data/mine",
        ),
        (
            ["+hydra.launcher.container.secrets.A=s3", "+hydra.launcher.container.env.A=1"],
            1,
            "hydra.launcher.container.secrets.A and hydra.launcher.container.env.A set one variable",
        ),
        (["+hydra.launcher.container.secrets.A=s3/a/b"], 1, "secrets.A=s3/a/b: give a Secret of the namespace"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(
    submit: Callable[..., str], arguments: list[str], code: int, words: str
) -> None:
    told = submit(*arguments, code=code)
    assert words in told
    assert "Traceback" not in told


def test_without_a_cluster_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert k8s.main(["list"]) == 1
    assert "no cluster" in capsys.readouterr().err
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "u", "user": {}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    assert k8s.main(["status", "r"]) == 1
    assert "the cluster at http://127.0.0.1:9 does not answer" in capsys.readouterr().err
    assert k8s.main(["list", "--context", "other"]) == 1
    assert "other" in capsys.readouterr().err


@given(
    st.text(st.characters(codec="ascii", exclude_characters="/\0"), min_size=1).filter(
        lambda name: name not in (".", "..")
    )
)
def test_names_are_labels_that_leave_room_for_the_pods(name: str) -> None:
    found = job_name(Path("/runs", name))
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", found)
    assert len(f"{found}-worker-999") <= 63
    assert found == job_name(Path("/runs", name))


def test_names_tell_points_apart() -> None:
    points = [f"/runs/r/{'long.key=1,' * 9}x={value}" for value in range(50)] + [
        "/runs/r/a=1",
        "/runs/r/a-1",
        "/runs/r-a-1",
        "/runs/R-a-1",
    ]
    assert len({job_name(Path(point)) for point in points}) == len(points)
    assert job_name(Path("/runs/first")) == "first"


def test_a_job_is_known_by_the_directory_of_its_run_too() -> None:
    point = "runs/weights/loss.cycle_text_weight=0.1"
    assert named_job(point) == named_job(f"/{point}/") == job_name(Path("/", point)) != point
    assert named_job("runs/weights") == named_job("weights") == "weights"
    for word in ("data/mine", "/runs/", "runs/../data"):
        with pytest.raises(UserError, match="below /runs; give runs/NAME"):
            named_job(word)


def test_resuming_a_sweep_passes_over_what_runs() -> None:
    def job(name: str, suspended: bool, condition: str) -> dict[str, Any]:
        conditions = [{"type": condition, "status": "True"}]
        spec = {"runPolicy": {"suspend": suspended}}
        return {"kind": "PyTorchJob", "metadata": {"name": name}, "spec": spec, "status": {"conditions": conditions}}

    jobs = [job("a", False, "Running"), job("b", True, "Suspended"), job("c", False, "Failed")]

    class Cluster:
        def get(self, name: str) -> dict[str, Any]:
            for one in jobs:
                if one["metadata"]["name"] == name:
                    return one
            raise Missing(name)

        def all(self, selector: str) -> list[dict[str, Any]]:
            return jobs if selector == f"{SWEEP_LABEL}=weights" else []

    assert [one["metadata"]["name"] for one in k8s.resumable(Cluster(), ["runs/weights"])] == ["b", "c"]
    with pytest.raises(UserError, match="job a is RUNNING: nothing to resume"):
        k8s.resumable(Cluster(), ["runs/weights", "a"])

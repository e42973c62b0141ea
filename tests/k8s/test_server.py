"""What a real API server says to the manifests and to the launcher. No container runs here."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_access import Access, wait_for
from k8s_node import Node
from k8s_runs import ROOT, apply_overlay

from job import k8s as launcher
from job.errors import UserError
from job.launch.kubernetes.cluster import Cluster, Missing, Unreachable
from job.launch.kubernetes.kinds import PYTORCH_JOB
from job.launch.kubernetes.manifests import pytorch_job
from job.launch.kubernetes.names import Object
from job.launch.kubernetes.pods import LaunchedRun
from job.launch.kubernetes.settings import ContainerSettings, Settings

pytest_plugins = ["k8s_lab"]
OVERLAYS = sorted(path.parent.name for path in (ROOT / "k8s" / "overlays").glob("*/kustomization.yaml"))
IMAGE = "hydra.launcher.container.image=registry.example/cyclevae:1"
TRAIN = ["data=synthetic", "training.device=cpu", IMAGE, "hydra.launcher.kind=pytorchjob"]


def a_job(name: str = "run", **changes: Any) -> Object:
    return pytorch_job(
        LaunchedRun(name, f"/runs/{name}", []),
        Settings(**{"container": ContainerSettings(image="registry.example/cyclevae:1"), **changes}),
    )


@dataclass
class Answer:
    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def k8s(
    kubernetes: Access, namespace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """`cyclevae k8s ARGUMENTS...` in this process, in the test's namespace."""

    def command(
        *arguments: str, kubeconfig: Path | str = kubernetes.env["KUBECONFIG"], namespace: str = namespace
    ) -> Answer:
        monkeypatch.setattr(
            "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig)
        )  # the variable KUBECONFIG, as read on import
        monkeypatch.setattr("sys.argv", sys.argv)
        code = launcher.main([arguments[0], f"--namespace={namespace}", *arguments[1:]])
        return Answer(code, *capsys.readouterr())

    return command


@pytest.fixture
def cluster(kubernetes: Access, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", kubernetes.env["KUBECONFIG"]
    )  # the variable, as read on import
    return Cluster(namespace)


def pods_number(kubernetes: Access, selector: str, where: list[str], expected: int) -> bool:
    """Whether there are so many pods."""
    return len(kubernetes.kubectl("get", "pods", selector, *where).split()) == expected


def is_served(kubernetes: Access, one: Object) -> bool:
    """Whether the server knows the kind of an object: others are of operators that the cluster lacks."""
    return one["apiVersion"] == "v1" or kubernetes.serves(one["apiVersion"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_applies_an_overlay(kubernetes: Access, operator: None, namespace: str, overlay: str) -> None:
    """The operator makes its pods, which the server checks more closely than the job that holds them."""
    objects, applied = apply_overlay(kubernetes, ROOT / "k8s" / "overlays" / overlay, namespace)
    unknown = [one for one in objects if not is_served(kubernetes, one)]
    complaints = [line for line in applied.stderr.splitlines() if "no matches for kind" in line]
    assert len(complaints) == len(unknown), applied.stderr
    assert applied.returncode == (1 if complaints else 0), applied.stderr
    for one in objects:
        if one not in unknown:
            place = f"--namespace={one['metadata'].get('namespace', 'default')}"
            kubernetes.kubectl("get", one["kind"], one["metadata"]["name"], place)
    jobs = [one for one in objects if one["kind"] == "PyTorchJob"]
    for job in jobs:
        where = [f"--namespace={job['metadata']['namespace']}", "--output=name"]
        replicas = sum(replica["replicas"] for replica in job["spec"]["pytorchReplicaSpecs"].values())
        if job["spec"]["runPolicy"]["suspend"]:
            kubernetes.kubectl(
                "wait",
                "--for=condition=Suspended",
                f"pytorchjob/{job['metadata']['name']}",
                *where[:1],
                "--timeout=110s",
            )
            replicas = 0
        selector = f"--selector=training.kubeflow.org/job-name={job['metadata']['name']}"
        pods_there = partial(pods_number, kubernetes, selector, where, replicas)
        wait_for(pods_there, f"{replicas} pods")
        kubernetes.kubectl("delete", "pytorchjob", job["metadata"]["name"], *where[:1])


def test_a_cluster_without_the_prometheus_operator_still_gets_the_dashboards(
    kubernetes: Access, namespace: str
) -> None:
    if kubernetes.serves_group("monitoring.coreos.com"):
        pytest.skip("the cluster has the Prometheus operator")
    applied = subprocess.run(
        ["kubectl", "apply", "-k", str(ROOT / "k8s" / "monitoring"), "--namespace", namespace],
        env=kubernetes.env,
        text=True,
        capture_output=True,
    )
    for kind in ("PodMonitor", "PrometheusRule"):
        assert f'no matches for kind "{kind}"' in applied.stderr
    maps = json.loads(
        kubernetes.kubectl(
            "get", "configmaps", "--namespace", namespace, "--selector=grafana_dashboard", "--output=json"
        )
    )["items"]
    panels = [json.loads(text)["panels"] for one in maps for text in one["data"].values()]
    assert len(panels) == len(list((ROOT / "docker" / "grafana" / "dashboards").glob("*.json")))
    assert all(panels)


def pod_spec(job: Object) -> Object:
    spec: Object = next(iter(job["spec"]["pytorchReplicaSpecs"].values()))["template"]["spec"]
    return spec


@pytest.mark.parametrize(
    ("what", "breaks"),
    [
        ("replicas", lambda job: job["spec"]["pytorchReplicaSpecs"]["Master"].update(replicas="two")),
        ("suspend", lambda job: job["spec"]["runPolicy"].update(suspend="no")),
        ("memory", lambda job: pod_spec(job)["containers"][0]["resources"].update(limits={"memory": "plenty"})),
        ("containers", lambda job: pod_spec(job).pop("containers")),
        (
            "containerPort",
            lambda job: pod_spec(job)["containers"][0]["ports"].append({"name": "more", "containerPort": "many"}),
        ),
        ("pytorchReplicaSpecs", lambda job: job["spec"].pop("pytorchReplicaSpecs")),
        ("metadata.name", lambda job: job["metadata"].update(name="No_Name")),
        ("metadata.labels", lambda job: job["metadata"]["labels"].update(bad="no spaces please")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_server_refuses_a_broken_job_and_names_the_field(
    cluster: Cluster, what: str, breaks: Callable[[Object], Any]
) -> None:
    cluster.create(a_job(), dry_run=True)
    job = copy.deepcopy(a_job())
    breaks(job)
    with pytest.raises(UserError, match=what) as refused:
        cluster.create(job)
    assert "\n" not in str(refused.value)
    assert cluster.all() == []


def test_what_a_dry_run_prints_is_what_is_sent(kubernetes: Access, cluster: Cluster, k8s: Command) -> None:
    make_claims(kubernetes, cluster.namespace)
    printed = k8s("submit", "--dry-run", "logging.run_name=printed", *TRAIN).out
    create = ("create", f"--namespace={cluster.namespace}", "--filename=-", "--dry-run=server", "--output=json")
    expected = json.loads(kubernetes.kubectl(*create, stdin=printed))  # with the defaults of the definition
    assert k8s("submit", "logging.run_name=printed", *TRAIN).code == 0
    stored = cluster.get("printed")
    assert stored["spec"] == expected["spec"]
    assert [stored["metadata"][key] for key in ("name", "labels", "annotations")] == [
        expected["metadata"][key] for key in ("name", "labels", "annotations")
    ]


def make_claims(kubernetes: Access, namespace: str) -> None:
    """The claims of k8s/base; the namespace of a cluster that is there has its own."""
    if not kubernetes.given:
        path = str(ROOT / "k8s" / "base" / "claims.yaml")
        kubernetes.kubectl("apply", f"--namespace={namespace}", "--filename", path)


def test_what_is_missing_is_said_in_one_line(kubernetes: Access, namespace: str, k8s: Command) -> None:
    def said(*arguments: str, **kwargs: str | Path) -> str:
        answer = k8s(*arguments, **kwargs)
        assert answer.code == 1, answer
        assert len(answer.err.splitlines()) == 1, answer
        return answer.err

    submit = ["submit", "logging.run_name=run", *TRAIN]
    assert f"namespace {namespace} has no claim elsewhere" in said(*submit, "hydra.launcher.runs_claim=elsewhere")
    make_claims(kubernetes, namespace)
    lacking = "queue nowhere" if kubernetes.serves_group("kueue.x-k8s.io") else "no Kueue"
    assert lacking in said(*submit, "hydra.launcher.queue=nowhere")
    assert "no service account trainer" in said(*submit, "hydra.launcher.service_account=trainer")
    assert "nowhere" in said(*submit, namespace="nowhere")
    assert "no-such-job" in said("status", "no-such-job")
    assert "not-there" in said("list", "--context=not-there")
    assert "does not accept these credentials" in said(
        "list", kubeconfig=kubernetes.kubeconfig_with("stranger", {"token": "nonsense"})
    )
    closed = kubernetes.kubeconfig_with("closed", server="https://127.0.0.1:9")
    assert "does not answer" in said("list", kubeconfig=closed)
    assert kubernetes.kubectl("get", "pytorchjobs", f"--namespace={namespace}", "--output=name") == ""


def test_a_name_that_is_taken(kubernetes: Access, cluster: Cluster, k8s: Command) -> None:
    """By another run, by the same with other settings, by the same run."""
    make_claims(kubernetes, cluster.namespace)
    submit = ["submit", "logging.run_name=mine", *TRAIN]
    foreign = a_job("mine")
    foreign["metadata"]["annotations"]["cyclevae/run"] = "/runs/somebody-elses"
    cluster.create(foreign)
    assert "job mine is not of /runs/mine but of /runs/somebody-elses" in k8s(*submit).err
    cluster.delete(foreign)
    assert k8s(*submit).code == 0
    again = k8s(*submit)
    assert (again.code, "already" in again.out) == (0, True)
    other = k8s(*submit, "training.seed=1")
    assert (other.code, "with other settings" in other.err) == (1, True)


VERBS: list[tuple[str, str, list[str]]] = [
    ("pytorchjobs", "create", ["submit", "logging.run_name=other", *TRAIN]),
    ("pytorchjobs", "list", ["list"]),
    ("pytorchjobs", "get", ["status", "run"]),
    ("pytorchjobs", "patch", ["resume", "run"]),
    ("pods", "list", ["logs", "run"]),  # `status` and `list` show it as the row's reason
    ("pods/log", "get", ["logs", "run"]),
]


def test_the_role_is_enough_and_none_of_its_verbs_too_much(kubernetes: Access, cluster: Cluster, k8s: Command) -> None:
    role, binding = yaml.safe_load_all((ROOT / "k8s" / "base" / "rbac.yaml").read_text())
    binding["subjects"] = [{"kind": "ServiceAccount", "name": "launcher", "namespace": cluster.namespace}]
    where = f"--namespace={cluster.namespace}"
    make_claims(kubernetes, cluster.namespace)
    kubernetes.kubectl("create", "serviceaccount", "launcher", where)

    def grant(rules: list[Object]) -> None:
        kubernetes.kubectl(
            "apply", where, "--filename=-", stdin=yaml.safe_dump_all([{**role, "rules": rules}, binding])
        )

    token = kubernetes.kubectl("create", "token", "launcher", where)
    kubeconfig = kubernetes.kubeconfig_with("launcher", {"token": token})

    def run(arguments: list[str]) -> Answer:
        return k8s(*arguments, kubeconfig=kubeconfig)

    def is_refused(arguments: list[str], why: str) -> bool:
        answer = run(arguments)
        return why in answer.err and (answer.code, len(answer.err.splitlines())) == (1, 1)

    grant(role["rules"])
    for arguments in (
        ["submit", "logging.run_name=run", *TRAIN],
        ["list"],
        ["status", "run"],
        ["cancel", "run"],
        ["resume", "run"],
        ["cancel", "run"],
    ):  # again, as the operator may be at work, and its pods say nothing: ours does
        # The server reads roles with a delay.
        wait_for(lambda: run(arguments).code == 0, f"{arguments} to be allowed")  # noqa: B023
    labels = {"training.kubeflow.org/job-name": "run", "training.kubeflow.org/replica-index": "0"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ours", "labels": labels}}
    kubernetes.kubectl("create", where, "--filename=-", stdin=json.dumps(pod | {"spec": kubernetes.idle_pod()}))
    kubernetes.kubectl("wait", "--for=condition=Ready", "pod/ours", where, "--timeout=110s")
    for resource, verb, arguments in VERBS:
        less = [
            {**rule, "verbs": [one for one in rule["verbs"] if one != verb]} if resource in rule["resources"] else rule
            for rule in role["rules"]
        ]
        grant([rule for rule in less if rule["verbs"]])
        what = f'cannot {verb} resource "{resource}"'
        wait_for(partial(is_refused, arguments, what), f"{arguments}: {what}")


def test_a_watch_that_has_expired_starts_anew(
    own_node: Node, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between list and watch, the server forgets the version that was listed."""
    cluster.create({**a_job("first"), "spec": {**a_job()["spec"], "runPolicy": {"suspend": True}}})
    asked: list[str] = []
    listed = cluster.jobs.list_namespaced_custom_object

    def slow(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("watch") and "watch" not in asked:
            own_node.kubectl("annotate", "pytorchjob", "first", f"--namespace={cluster.namespace}", "touched=yes")
            own_node.compact()
            own_node.kill_server()  # what it remembers of older versions goes with it
            own_node.start_server()
        asked.append("watch" if kwargs.get("watch") else "list")
        return listed(*args, **kwargs)

    monkeypatch.setattr(cluster.jobs, "list_namespaced_custom_object", slow)
    changes = cluster.changes(PYTORCH_JOB, "")
    assert "touched" not in next(changes)["first"]["metadata"]["annotations"]
    assert "touched" in next(changes)["first"]["metadata"]["annotations"]
    assert asked == ["list", "watch", "list"]


def test_a_server_that_is_away_is_waited_for(
    own_node: Node, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.create({**a_job("first"), "spec": {**a_job()["spec"], "runPolicy": {"suspend": True}}})
    changes = cluster.changes(PYTORCH_JOB, "")
    assert list(next(changes)) == ["first"]
    own_node.kill_server()
    with pytest.raises(Unreachable, match="does not answer"):
        cluster.get("first")
    own_node.start_server()
    own_node.kubectl("delete", "pytorchjob", "first", f"--namespace={cluster.namespace}", "--cascade=orphan")
    seen: dict[str, Object] = {"first": {}}
    while seen:
        seen = next(changes)
    with pytest.raises(Missing):
        cluster.get("first")

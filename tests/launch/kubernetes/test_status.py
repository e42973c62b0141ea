"""What is read of a job: its conditions, its pods' status, its first rank's metrics and log. No cluster is needed."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from job.launch.kubernetes import logs
from job.launch.kubernetes.cluster import Unreachable
from job.launch.kubernetes.kinds import PYTORCH_JOB, state
from job.launch.kubernetes.names import CANCELLED_ANNOTATION, QUEUE_LABEL, RUN_ANNOTATION
from job.launch.kubernetes.status import lost_node, measured, queue_reason, run_status
from job.launch.kubernetes.status_lines import for_people, last_progress
from job.monitoring.exporter import Metrics


def job(*conditions: str, suspended: bool = False, queue: bool = False) -> dict[str, Any]:
    held = [
        {"type": one.lstrip("-"), "status": str(not one.startswith("-")), "message": "the operator's words"}
        for one in conditions
    ]
    return {
        "kind": "PyTorchJob",
        "metadata": {
            "name": "r",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {QUEUE_LABEL: "q"} if queue else {},
            "annotations": {RUN_ANNOTATION: "/runs/r"},
        },
        "spec": {"runPolicy": {"suspend": suspended}},
        "status": {"conditions": held},
    }


def test_states() -> None:
    assert state({**job(), "status": {}}) == "PENDING"
    assert state(job("Created")) == "PENDING"
    assert state(job("Created", "Running")) == "RUNNING"
    assert state(job("Created", "-Running", "Restarting")) == "RESTARTING"
    assert state(job("Created", "-Running", "Succeeded")) == "COMPLETED"
    assert state(job("Created", "-Running", "Restarting", "Failed")) == "FAILED"
    assert state(job("Created", "-Running", "Suspended", suspended=True)) == "SUSPENDED"
    assert state(job("Created", suspended=True, queue=True)) == "QUEUED"


class Pods:
    """Stands in for a Cluster that has one job's pods, each with its log, its exit code and its last words."""

    def __init__(self, *pods: tuple[str, int | None, str | None]) -> None:
        self._logs = {f"r-worker-{index}": log for index, (log, _, _) in enumerate(pods)}
        self._pods = [self._pod(index, code, message) for index, (_, code, message) in enumerate(pods)]

    @staticmethod
    def _pod(index: int, code: int | None, message: str | None) -> Any:
        ended = None if code is None else SimpleNamespace(exit_code=code, message=message, reason=None)
        container = SimpleNamespace(state=SimpleNamespace(terminated=ended, waiting=None))
        return SimpleNamespace(
            metadata=SimpleNamespace(
                name=f"r-worker-{index}", labels={PYTORCH_JOB.index_label: str(index)}, annotations=None
            ),
            status=SimpleNamespace(init_container_statuses=None, container_statuses=[container], conditions=[]),
        )

    def pods(self, _job: Any) -> list[Any]:
        return self._pods

    def warnings(self, _job: Any) -> list[Any]:
        return []

    def workload(self, _job: Any) -> None:
        return None

    def metrics(self, _pod: Any, _path: str = "metrics") -> None:
        return None

    def log(self, pod: str, lines: int) -> str:
        return "".join(line + "\n" for line in self._logs[pod].splitlines()[-lines:])


def words(time: float, message: str, consequence: bool, rank: int = 0) -> str:
    """What attempt.py leaves of a failure."""
    failure = {"time": time, "rank": rank, "node": f"n{rank}", "message": message, "exit_code": 1}
    return json.dumps(failure | {"consequence": consequence})


def reason(cluster: Any) -> str | None:
    return run_status(cluster, job("Failed")).reason


def test_the_cause_is_named_and_not_what_others_said_of_it() -> None:
    pods = Pods(
        ("error: lost another rank", 1, words(1.0, "lost another rank: rank 1 gave up", consequence=True)),
        ("error: CUDA", 1, words(2.0, "RuntimeError: CUDA error\nmore of it", consequence=False, rank=1)),
    )
    assert reason(pods) == "FAILED (exit code 1) rank 1 (n1): RuntimeError: CUDA error"


@pytest.mark.parametrize("message", [None, "", "not of ours", '{"reason": "of another program"}', "[1]"])
def test_without_a_record_the_end_of_the_failed_pods_log_is_shown(message: str | None) -> None:
    """A container that was killed, or whose Python could not start, says nothing of its own."""
    pods = Pods(("step 1/9", None, None), ("step 1/9\n" + STATUS_LINE + "\nFatal Python error: segfault", 139, message))
    told = reason(pods)
    assert told is not None
    assert [line.strip() for line in told.splitlines()] == [
        "FAILED (exit code 139) no failure was recorded; the last lines of the log:",
        "step 1/9",
        "Fatal Python error: segfault",
    ]


def test_a_job_without_pods_has_the_operators_words() -> None:
    assert reason(Pods()) == "FAILED (the operator's words)"


PROGRESS = {
    "cyclevae": "progress",
    "step": 40,
    "steps": 80,
    "loss": 2.5,
    "tokens_per_second": 51230.0,
    "seconds_left": 4000,
}
STATUS_LINE = json.dumps(PROGRESS)
LOG = f"""\
step 20/80  loss 4.51  l2t 3  123 tokens/s  1:07:11 left
{json.dumps(PROGRESS | {"step": 20})}
step 40/80  loss 2.5  51.2k tokens/s  1:06:40 left
{STATUS_LINE}
{{"cyclevae": "something newer"}}
{{"cyclevae": "progress", "step": 60, "ste
the last line of a user's own print
"""


def test_numbers_are_read_from_status_lines_where_there_are_no_metrics() -> None:
    assert last_progress(LOG) == PROGRESS
    assert last_progress("nothing yet\n") == {}
    pods = Pods(("another rank's log", None, None), (LOG, None, None))
    row = run_status(pods, job("Running"))  # type: ignore[arg-type]
    assert (row.state, row.alive, row.step, row.steps, row.loss, row.tokens_per_second, row.seconds_left) == (
        "RUNNING",
        False,
        40,
        80,
        2.5,
        51230.0,
        4000,
    )
    assert (row.run, row.job, row.restarts, row.reason) == ("/runs/r", "r", None, None)


def test_a_run_that_says_nothing_yet() -> None:
    row = run_status(Pods(("", None, None)), job("Running"))  # type: ignore[arg-type]
    assert (row.step, row.steps, row.loss, row.seconds_left) == (0, None, None, None)


def test_logs_are_shown_without_the_lines_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    shown = for_people(LOG)
    assert len(shown) == 4, "what was cut short is no status line, and is shown"
    logs.show(Pods((LOG, None, None)), job(), 2)  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines() == shown[-2:], "as many lines as were asked for"


class Stream(Pods):
    """A pod's log as it comes, each line after its time; the pod has ended."""

    def log_stream(self, pod: str, _lines: int | None) -> list[str]:
        return [f"2026-01-01T00:00:0{number}Z {line}" for number, line in enumerate(self._logs[pod].splitlines())]

    def phase(self, _pod: Any) -> str:
        return "Succeeded"


def test_a_log_is_followed_without_the_lines_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Stream((LOG, 0, None))
    logs.read(cluster, cluster.pods(job())[0], "0: ", 50)  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines() == [f"0: {line}" for line in for_people(LOG)]


def test_numbers_are_read_from_the_endpoint_as_it_writes_them() -> None:
    from prometheus_client import generate_latest

    metrics = Metrics("first", 0, lambda: {("cyclevae_step", ()): 30.0})
    metrics.set(
        {
            ("cyclevae_target_steps", ()): 80.0,
            ("cyclevae_loss", ("total",)): 4.5,
            ("cyclevae_loss", ("cycle_text",)): 1.0,
            ("cyclevae_tokens_per_second", ()): 123.4,
            ("cyclevae_restarts_total", ()): 2.0,
        }
    )
    for _ in range(10):
        metrics.step_duration.observe(0.5)
    found = measured(generate_latest(metrics.registry).decode())
    assert {
        name: found[name] for name in ("step", "steps", "loss", "tokens_per_second", "restarts", "seconds_left")
    } == {"step": 30, "steps": 80, "loss": 4.5, "tokens_per_second": 123.4, "restarts": 2, "seconds_left": 25}
    assert measured("") == {}


class Deaf(Pods):
    """Pods on a node that is away: the server answers for it with an error."""

    def log(self, pod: str, lines: int) -> str:
        raise Unreachable(f"log of pod {pod}: the cluster says 500: connection refused")


def test_a_pod_that_does_not_answer_is_one_rows_reason() -> None:
    row = run_status(Deaf(("", None, None)), job("Running"))  # type: ignore[arg-type]
    assert (row.state, row.reason) == ("RUNNING", "log of pod r-worker-0: the cluster says 500: connection refused")


def on_a_node(ready: str, containers_ready: str) -> Any:
    (pod,) = Pods(("", None, None)).pods(None)
    pod.spec = SimpleNamespace(node_name="node2")
    pod.status.conditions = [
        SimpleNamespace(type="Ready", status=ready, last_transition_time="12:00", message=None),
        SimpleNamespace(type="ContainersReady", status=containers_ready, last_transition_time="11:00", message=None),
    ]
    return pod


def test_a_node_that_does_not_answer_is_named() -> None:
    said = lost_node(on_a_node("False", "True"))
    assert said is not None
    assert said.startswith("node2 does not answer since 12:00: r-worker-0 is made again when the node is back, deleted")
    assert "holds the rendezvous" in said
    assert lost_node(on_a_node("True", "True")) is None
    assert lost_node(on_a_node("False", "False")) is None, "its own containers are not ready"


def test_a_queued_job_has_the_words_of_kueue() -> None:
    waiting = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": "insufficient quota for cpu"}
    queued = job("Created", suspended=True, queue=True)
    evicted = {"type": "Admitted", "status": "False", "reason": "NoReservation", "message": "it has no reservation"}
    for conditions in ([waiting], [evicted, waiting]):
        assert queue_reason(queued, {"status": {"conditions": conditions}}) == "Kueue: insufficient quota for cpu"
    said = queue_reason(queued, None)
    assert said is not None
    assert "Kueue has made no Workload of it: it does not manage PyTorchJobs here" in said
    queued["metadata"]["creationTimestamp"] = datetime.now(UTC).isoformat()
    assert queue_reason(queued, None) is None, "it may still come"


def test_a_cancelled_job_keeps_its_last_known_progress() -> None:
    cancelled = job("Created", suspended=True, queue=True)
    cancelled["metadata"]["annotations"][CANCELLED_ANNOTATION] = '{"step": 40, "steps": 80, "loss": 2.5}'
    row = run_status(Pods(), cancelled)  # type: ignore[arg-type]
    assert (row.state, row.step, row.steps, row.loss) == ("SUSPENDED", 40, 80, 2.5)
    cancelled["metadata"]["annotations"][CANCELLED_ANNOTATION] = "by hand"
    assert run_status(Pods(), cancelled).steps is None  # type: ignore[arg-type]


def train_job(suspended: bool = False, **status: Any) -> dict[str, Any]:
    metadata = {"name": "r", "labels": {}, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"kind": "TrainJob", "metadata": metadata, "spec": {"suspend": suspended}, "status": status}


def test_states_of_a_train_job() -> None:
    resumed = {"type": "Suspended", "status": "False"}
    assert state(train_job()) == "PENDING"
    assert state(train_job(conditions=[resumed], jobsStatus=[{"name": "node", "active": 2}])) == "RUNNING"
    assert state(train_job(jobsStatus=[{"name": "node", "active": 0, "failed": 1}])) == "RESTARTING"
    assert state(train_job(suspended=True)) == "SUSPENDED"
    assert state(train_job(conditions=[{"type": "Complete", "status": "True"}])) == "COMPLETED"
    assert state(train_job(conditions=[{"type": "Failed", "status": "True", "message": "m"}])) == "FAILED"


def test_a_train_job_tells_its_progress_by_itself() -> None:
    metrics = [{"name": "step", "value": "42"}, {"name": "steps", "value": "100"}, {"name": "loss", "value": "6.5"}]
    posted = {"progressPercentage": 42, "estimatedRemainingSeconds": 77, "metrics": metrics}
    row = run_status(Pods(), train_job(trainerStatus=posted))  # type: ignore[arg-type]
    assert (row.step, row.steps, row.loss, row.seconds_left) == (42, 100, 6.5, 77)

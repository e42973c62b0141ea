"""What is read from run directories, and how a sweep is waited for: no cluster needed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from job import slurm
from job.config import Config, to_dict
from job.errors import JobError, UserError
from job.files import by_number
from job.launch import waiting
from job.launch.points import Point
from job.launch.run_status import show
from job.launch.slurm import scheduler, sweep
from job.launch.slurm.run_directory import RunDirectory, find_runs, statuses
from job.launch.slurm.scheduler import QueuedJob
from job.launch.waiting import Outcome

LOG = """\
slurm: 2026-01-01 10:00:00 job 7, restart 0: started (2 nodes, 2 tasks)
1: error: of an earlier start
slurm: 2026-01-01 10:01:00 job 7, restart 1: started (2 nodes, 2 tasks)
0: step 1/80  loss 4.7
0: error: lost another rank: rank 1 on n2 gave up: CUDA error [connection closed]
1: Error executing job with overrides: ['model=small']
1: Traceback (most recent call last):
1: torch.AcceleratorError: CUDA error: device-side assert triggered
srun: error: n2: task 1: Exited with exit code 1
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    path = tmp_path / "runs" / "sweep" / "a=1"
    (path / "slurm").mkdir(parents=True)
    (path / "slurm" / "7.log").write_text(LOG)
    events = [
        {"time": 1, "job": "7", "restarts": 1, "event": "started", "reason": "", "exit_code": None},
        {"time": 2, "job": "7", "restarts": 1, "event": "failed", "reason": "exit code 1", "exit_code": 1},
    ]
    (path / "slurm" / "events.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events) + '{"time": 3, "jo'
    )
    (path / "training_log.jsonl").write_text(
        '{"step": 20, "loss": 4.5, "tokens_per_second": 100.0, "step_seconds": 2.0}\n'
    )
    (path / "config.yaml").write_text("training: {num_train_steps: 80}\n")
    return RunDirectory(path)


def record(run: RunDirectory, rank: int, time: float, message: str, consequence: bool) -> None:
    """What a rank leaves that fails."""
    failure = {"time": time, "rank": rank, "node": f"n{rank + 1}", "message": message, "exit_code": 1}
    with (run.path / "slurm" / "failures.jsonl").open("a") as file:
        file.write(json.dumps(failure | {"consequence": consequence}) + "\n")


def test_the_first_failing_rank_is_named_not_the_others(run: RunDirectory) -> None:
    record(run, 0, 10.0, "lost another rank: rank 1 on n2 gave up: CUDA error [connection closed]", consequence=True)
    record(run, 1, 12.0, "torch.AcceleratorError: CUDA error: device-side assert triggered", consequence=False)
    record(run, 2, 13.0, "of a later one", consequence=False)
    assert run.first_failure("7") == "rank 1 (n2): torch.AcceleratorError: CUDA error: device-side assert triggered"


def test_without_a_record_the_end_of_the_log_is_shown_and_not_interpreted(run: RunDirectory) -> None:
    """srun's own failures, and those of an interpreter that cannot start, come before any code of ours."""
    told = run.first_failure("7")
    assert told is not None
    first, *lines = told.splitlines()
    assert first == "no failure was recorded; the last lines of the log:"
    assert [line.strip() for line in lines] == LOG.splitlines()[-len(lines) :]
    assert len(lines) >= 5
    assert run.first_failure("8") is None, "it has no log"


def test_status_from_the_run_directory_alone(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scheduler, "available", lambda: False)
    assert find_runs(run.path.parent.parent) == [run]
    assert slurm.main(["status", "--json", str(run.path)]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert {
        name: status[name]
        for name in ("job", "state", "alive", "step", "steps", "loss", "seconds_left", "restarts", "reason")
    } == {
        "job": "7",
        "state": "FAILED",
        "alive": False,
        "step": 20,
        "steps": 80,
        "loss": 4.5,
        "seconds_left": 120,
        "restarts": 1,
        "reason": f"exit code 1; {run.first_failure('7')}",
    }
    queued = {"7": QueuedJob("RUNNING")}
    (run.path / "slurm" / "alive").touch()
    assert run.status(queued, {}).alive
    os.utime(run.path / "slurm" / "alive", (0, 0))
    assert not run.status(queued, {}).alive


def test_the_outcome_without_accounting(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "ended", lambda _jobs: {})
    assert run.outcome("7") == "FAILED (exit code 1)"
    assert run.outcome("8") == "ended without a word (never started) (exit code )"


def test_the_outcome_where_accounting_lags(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "ended", lambda _jobs: {"7": ("PREEMPTED", "0:0"), "8": ("TIMEOUT", "0:0")})
    assert run.outcome("7") == "FAILED (exit code 1)"
    assert run.outcome("8") == "TIMEOUT (exit code 0:0)"


def test_a_run_has_one_job_at_a_time(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["cyclevae"])
    monkeypatch.setattr(scheduler, "available", lambda: False)
    monkeypatch.setattr(scheduler, "queued", lambda: {"7": "RUNNING"})
    where = [f"logging.save_dir={run.path.parent}", f"logging.run_name='{run.path.name}'"]
    assert slurm.main(["submit", "data=synthetic", *where]) == 1
    assert f"error: {run.path} is being trained by job 7" in capsys.readouterr().err


def test_waiting_ends_when_no_run_is_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that restarts is asked again, a job between two lives is not over, and other jobs do not matter."""
    answers: list[dict[str, str]] = [
        {},
        {"7": "RUNNING"},
        {"9": "RUNNING"},
        {"7": "RUNNING"},
        {"9": "RUNNING"},
        {"9": "RUNNING"},
    ]

    def queued() -> dict[str, str]:
        answer = answers.pop(0)
        if not answer:
            raise JobError("squeue: no answer")
        return answer

    monkeypatch.setattr(scheduler, "queued", queued)
    monkeypatch.setattr(scheduler, "ended", lambda _jobs: {"7": ("COMPLETED", "0:0")})
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    point = Point(tmp_path, tmp_path, "a=1", [], Config())
    assert sweep.wait({"7": point}) == [Outcome("7", "a=1", "COMPLETED", None, f"{tmp_path}/slurm/7.log")]
    assert answers == []


def submitted(path: Path, job: str, **more: object) -> RunDirectory:
    (path / "slurm").mkdir(parents=True)
    note = {"job": job, "again": ["sbatch", "script"], "index": None, "time": 1} | more
    (path / "slurm" / "submission.json").write_text(json.dumps(note))
    return RunDirectory(path)


def test_a_cancelled_job_that_still_notes_its_end_is_not_the_latest(tmp_path: Path) -> None:
    run = submitted(tmp_path / "r", "8", time=3)
    events = [{"time": 1, "job": "7", "event": "started"}, {"time": 5, "job": "7", "event": "stopped"}]
    (run.path / "slurm" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert run.job == "8"
    started = {"time": 4, "job": "9", "event": "started"}  # by sbatch slurm/train.sbatch, which notes no submission
    (run.path / "slurm" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in [*events, started]))
    assert RunDirectory(run.path).job == "9"


def test_why_a_job_waits(tmp_path: Path) -> None:
    run = submitted(tmp_path / "r", "8")
    queued = {"8": QueuedJob("PENDING", "Resources", "2026-01-01T10:00:00")}
    (row,) = statuses([run], queued)
    assert (row.state, row.reason) == ("PENDING", "Resources, expected to start 2026-01-01T10:00:00")
    (row,) = statuses([run], {"8": QueuedJob("PENDING", "BadConstraints")})
    assert row.reason == "BadConstraints (no node is as the job asks)"


def test_a_job_that_died_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accounting knows how, and the job's own output may tell why."""
    runs = [submitted(tmp_path / name, name, folder=str(tmp_path)) for name in ("8", "9", "10")]
    (tmp_path / "9_0_log.out").write_text("module: command not found\n")
    monkeypatch.setattr(scheduler, "ended", lambda _jobs: {"8": ("CANCELLED", "0:0"), "9": ("FAILED", "3:0")})
    cancelled, failed, unknown = statuses(runs, {})
    assert (cancelled.state, cancelled.reason) == ("CANCELLED", "exit code 0:0")
    assert failed.state == "FAILED"
    assert failed.reason is not None
    assert failed.reason.startswith("exit code 3:0; no failure was recorded; the last lines of the log:")
    assert failed.reason.endswith("module: command not found")
    assert failed.log == str(tmp_path / "9_0_log.out")
    assert unknown.state == "ENDED"
    assert [row.state for row in statuses(runs, None)] == ["SUBMITTED"] * 3, "SLURM does not answer"


@pytest.mark.parametrize("name", ["slurm/submission.json", "config.yaml", "training_log.jsonl", "slurm/events.jsonl"])
def test_a_damaged_file_is_named_and_spoils_no_other_run(run: RunDirectory, name: str) -> None:
    other = submitted(run.path.with_name("a=2"), "8")
    (run.path / name).write_bytes(b"\xff{")
    damaged, whole = statuses([RunDirectory(run.path), other], None)
    assert damaged.state == "DAMAGED"
    assert f"{run.path / name} cannot be read" in str(damaged.reason)
    assert whole.state == "SUBMITTED"


def test_a_refused_job_is_not_the_runs(run: RunDirectory) -> None:
    with (run.path / "slurm" / "events.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"time": 4, "job": "9", "event": "refused", "reason": "", "exit_code": 1}) + "\n")
    (run.path / "slurm" / "submission.json").write_text(json.dumps({"job": "9", "time": 3}))
    assert run.job == "7"


def test_numbers_are_sorted_as_numbers() -> None:
    names = ["seed=10", "seed=2", "lr=0.5", "seed=2,x=1"]
    weights = ["w=0.1", "w=1", "w=0.05", "w=1e-05", "w=0.2"]
    assert sorted(map(Path, weights), key=by_number) == [Path(f"w={w}") for w in ("1e-05", "0.05", "0.1", "0.2", "1")]
    assert sorted(map(Path, names), key=by_number) == list(map(Path, ["lr=0.5", "seed=2", "seed=2,x=1", "seed=10"]))


def test_a_sweep_is_given_by_its_directory(run: RunDirectory, tmp_path: Path) -> None:
    other = submitted(run.path.with_name("a=10"), "8")
    third = submitted(run.path.with_name("a=2"), "9")
    assert RunDirectory.chosen([run.path.parent]) == [run, third, other]


@pytest.mark.parametrize("name", ["999999", "12_3", "{run}"])
def test_what_is_not_in_the_queue_is_not_cancelled(
    name: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scheduler, "queued", lambda: {"12_4": "RUNNING"})
    monkeypatch.setattr(scheduler, "output", lambda *command: pytest.fail(f"{command}"))
    assert slurm.main(["cancel", name.format(run=run.path)]) == 1
    assert "nothing to cancel" in capsys.readouterr().err


def test_what_is_cancelled(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run, a task of an array, an array; of a sweep what is left."""
    commands: list[tuple[str, ...]] = []
    submitted(run.path.with_name("a=2"), "9")
    monkeypatch.setattr(scheduler, "queued", lambda: {"12_3": "RUNNING", "12_4": "PENDING", "7": "RUNNING"})
    monkeypatch.setattr(scheduler, "output", lambda *command: commands.append(command))
    assert slurm.main(["cancel", str(run.path), "12_3", "12", str(run.path.parent)]) == 0
    assert commands == [("scancel", job) for job in ("7", "12_3", "12", "7")]


def test_what_a_sweep_still_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished points and those in the queue are left out and named; a finished one that was changed is not."""
    monkeypatch.setattr(scheduler, "queued", lambda: {"1": "PENDING", "2": "COMPLETING"})
    points = [Point(tmp_path / name, tmp_path, name, [], Config()) for name in ("queued", "ends", "done", "changed")]
    for job, point in enumerate(points, 1):
        submitted(point.run_dir, str(job))
    for point in points[2:]:
        (point.run_dir / "checkpoints" / f"step_{point.config.training.num_train_steps:08}").mkdir(parents=True)
        (point.run_dir / "result.json").touch()
        (point.run_dir / "config.yaml").write_text(OmegaConf.to_yaml(to_dict(point.config)))
    (points[3].run_dir / "config.yaml").write_text("training: {num_train_steps: 1}\n")
    assert sweep.busy(points) == {"1": points[0]}
    assert [sweep.is_finished(point) for point in points] == [False, False, True, False]
    assert capsys.readouterr().out.splitlines() == [
        "job 1: queued  (in the queue already: PENDING)",
        f"finished already: done  ({tmp_path}/done)",
    ]
    with pytest.raises(UserError, match="is being trained by job 1"):
        sweep.busy(points[:1])


def test_what_is_resumed_of_a_sweep(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a finished point nor one that is in the queue; one that was cancelled and still saves."""
    script = str(run.path / "script")
    Path(script).touch()
    others = [submitted(run.path.with_name(f"a={job}"), str(job), again=["sbatch", script]) for job in (8, 9, 10)]
    (others[0].path / "slurm" / "events.jsonl").write_text('{"time": 2, "job": "8", "event": "finished"}\n')
    monkeypatch.setattr(scheduler, "queued", lambda: {"9": "RUNNING", "7": "PENDING"})
    assert slurm.main(["resume", "--dry-run", "--json", str(run.path.parent)]) == 0
    assert list(json.loads(capsys.readouterr().out)) == [str(others[2].path)]
    monkeypatch.setattr(scheduler, "queued", lambda: {"9": "RUNNING", "7": "PENDING", "10": "COMPLETING"})
    assert slurm.main(["resume", "--dry-run", "--json", str(run.path.parent)]) == 0
    assert list(json.loads(capsys.readouterr().out)) == [str(others[2].path)]
    monkeypatch.setattr(scheduler, "queued", lambda: {"9": "RUNNING", "7": "PENDING", "10": "RUNNING"})
    assert slurm.main(["resume", "--dry-run", str(run.path.parent)]) == 1
    assert "every run is finished or has a job in the queue" in capsys.readouterr().err


def test_results_and_node_hours(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes for an hour, four for half of one; the third start was killed with its node."""
    starts = [("started", 0, 2), ("requeued", 3600, 2), ("started", 7200, 4), ("failed", 9000, 4), ("started", 9999, 2)]
    lines = [
        json.dumps({"time": time, "job": "7", "restarts": 0, "event": event, "reason": "", "node_count": nodes})
        for event, time, nodes in starts
    ]
    (run.path / "slurm" / "events.jsonl").write_text("\n".join(lines) + "\n")
    (run.path / "evaluation.jsonl").write_text('{"step": 20, "l2t/latent_gain": 1.25, "samples": 4}\n')
    status = run.status(None, {})
    assert status.results == {"l2t/latent_gain": 1.25, "samples": 4}
    assert status.node_hours == 4
    show([status, submitted(run.path.with_name("a=2"), "8").status(None, {})], as_json=False)
    header, first, *_, second = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["l2t/latent_gain", "run"]
    assert (first.split()[-2], second.split()[-2]) == ("1.250", "-")


def test_waiting_for_runs_that_were_submitted_before(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = submitted(run.path.with_name("a=2"), "8")
    monkeypatch.setattr(scheduler, "queued", dict)
    monkeypatch.setattr(scheduler, "ended", lambda _jobs: {"8": ("COMPLETED", "0:0")})
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(waiting, "ended", [])
    monkeypatch.setattr(waiting, "waited_for", [])
    assert slurm.main(["wait", str(run.path.parent)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "job 7: FAILED (exit code 1)  (a=1)"
    assert f"job 8: COMPLETED  ({other.path.name})" in printed.out.splitlines()
    assert "a=2: has not started yet" in printed.out.splitlines()[-1]
    assert "1 of 2 runs did not finish" in printed.err


def test_a_list_that_is_shown_again_and_again(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, "available", lambda: False)
    monkeypatch.setattr("time.sleep", sleep)
    assert slurm.main(["status", str(run.path), "--watch", "2"]) == 130
    assert (waits, capsys.readouterr().out.count("FAILED")) == ([2, 2], 2)

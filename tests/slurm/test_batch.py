"""slurm/train.sbatch on two nodes: whatever ends a job, it goes on as if nothing had happened, or says why not."""

from __future__ import annotations

import json
import sys

import pytest
from slurm_runs import ROOT, STEPS, Losses, Slurm, events, losses

pytest_plugins = ["slurm_lab"]
pytestmark = pytest.mark.timeout(1200)
FAULTY = f"{sys.executable} {ROOT}/tests/slurm/faulty.py"
WAITING = {"CYCLEVAE_PYTHON": f"{FAULTY} wait"}  # for what the test does to it


def test_requeue_by_an_administrator(slurm: Slurm, quiet: Losses) -> None:
    job = slurm.sbatch("run", env=WAITING)
    slurm.reached("run", 15, job)
    assert [path.name for path in (slurm.directory / ".targets").iterdir()] == [f"cyclevae-run@{job}.json"]
    slurm.cluster.run("scontrol", "requeue", job)
    states = slurm.ended(job)
    assert states[-1] == ("COMPLETED", "0:0")
    assert states[0][0] == "REQUEUED"
    assert slurm.field(job, "Restarts") == "1"
    assert losses(slurm.directory / "run") == quiet
    assert "told to stop by SIGTERM" in (slurm.directory / "run" / "slurm" / f"{job}.log").read_text()


def test_preemption_by_a_higher_priority(slurm: Slurm, quiet: Losses) -> None:
    """In a partition that gives grace time, in which the ranks end by themselves, and in one that gives none."""
    jobs = {
        partition: slurm.sbatch(partition, options=(f"--partition={partition}",), env=WAITING)
        for partition in ("main", "abrupt")
    }
    for partition, job in jobs.items():
        slurm.reached(partition, 5, job)
    slurm.jobs.append(
        slurm.cluster.run(
            "sbatch",
            "--parsable",
            "--partition=high",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=sleep 1",
        )
    )
    for partition, job in jobs.items():
        assert slurm.ended(job)[-1] == ("COMPLETED", "0:0")
        # Within the grace time both the batch step and SLURM ask for the requeue. SLURM 24.11 then starts the job once
        # more when it has finished, and it finds itself finished.
        assert slurm.field(job, "Restarts") in (("1", "2") if partition == "main" else ("1",))
        assert losses(slurm.directory / partition) == quiet


def test_a_warning_to_the_batch_step_reaches_the_ranks(slurm: Slurm, quiet: Losses) -> None:
    """As SLURM sends it before a time limit (--signal=B:USR1@180)."""
    job = slurm.sbatch("run", env=WAITING)
    slurm.reached("run", 15, job)
    slurm.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.ended(job)[-1] == ("COMPLETED", "0:0")
    assert losses(slurm.directory / "run") == quiet
    assert events(slurm.directory / "run") == ["started", "requeued", "started", "finished"]


def test_scancel_is_final_and_loses_nothing(slurm: Slurm, quiet: Losses) -> None:
    job = slurm.sbatch("run", env=WAITING)
    slurm.reached("run", 15, job)
    slurm.cluster.run("scancel", job)
    assert [state for state, _ in slurm.ended(job)] == ["CANCELLED"]
    assert slurm.field(job, "Restarts") == "0"
    again = slurm.sbatch("run")
    assert slurm.ended(again) == [("COMPLETED", "0:0")]
    assert losses(slurm.directory / "run") == quiet
    assert "from step 0 " not in (slurm.directory / "run" / "slurm" / f"{again}.log").read_text()


def test_a_node_set_down(slurm: Slurm, quiet: Losses) -> None:
    job = slurm.sbatch("run", env=WAITING)
    slurm.reached("run", 15, job)
    node = slurm.cluster.names[1]
    slurm.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        slurm.wait(lambda: slurm.field(job, "Restarts") == "1", "the requeue", job)
    finally:
        slurm.cluster.run(
            "scontrol", "update", f"nodename={node}", "state=resume", check=False
        )  # it may have come back by itself
    states = slurm.ended(job)
    assert [state for state, _ in states] == ["NODE_FAIL", "COMPLETED"]
    assert losses(slurm.directory / "run") == quiet


def test_an_exception_on_any_rank_fails_the_job(slurm: Slurm, overdue: object) -> None:
    job = slurm.sbatch("run", env={"CYCLEVAE_PYTHON": f"{FAULTY} raise"})
    assert slurm.ended(job) == [("FAILED", "1:0")]
    assert events(slurm.directory / "run") == ["started", "failed"]
    assert "1: ArithmeticError: broken on purpose" in (slurm.directory / "run" / "slurm" / f"{job}.log").read_text()


def test_a_killed_rank_is_retried_as_often_as_allowed(slurm: Slurm) -> None:
    """Also on the node that has lost it twice, as there is no other."""
    job = slurm.sbatch(
        "run", "logging.save_freq=0", env={"CYCLEVAE_PYTHON": f"{FAULTY} kill", "CYCLEVAE_MAX_RESTARTS": "2"}
    )
    assert slurm.ended(job)[-1][0] == "FAILED"
    assert events(slurm.directory / "run") == ["started", "requeued", "started", "requeued", "started", "failed"]
    log = (slurm.directory / "run" / "slurm" / f"{job}.log").read_text()
    assert "2 restarts without a new checkpoint, max_restarts=2" in log
    assert "restart 1 of at most 2 from checkpoint none" in log
    bad = slurm.cluster.names[1]
    assert f"{bad} lost ranks twice, but the job could not run without: not excluded" in log
    notes = [json.loads(line) for line in (slurm.directory / "run/slurm/nodes.jsonl").read_text().splitlines()]
    assert [(note["node"], note["ranks"]) for note in notes] == [(bad, [1])] * 3
    assert not list((slurm.directory / ".targets").glob("*.json"))


def test_a_finished_run_finds_itself_finished(quiet_job: tuple[Slurm, str], quiet: Losses) -> None:
    slurm, job = quiet_job
    slurm.cluster.run("scontrol", "requeue", job)
    slurm.wait(lambda: slurm.field(job, "Restarts") == "1", "the requeue", job)
    assert slurm.ended(job)[-1] == ("COMPLETED", "0:0")
    assert f"is finished: {STEPS} steps" in (slurm.directory / "run" / "slurm" / f"{job}.log").read_text()
    assert losses(slurm.directory / "run") == quiet


def test_a_signal_before_the_trainer_is_ready(slurm: Slurm) -> None:
    job = slurm.sbatch("run", "training.num_train_steps=300", env={"CYCLEVAE_PYTHON": f"{FAULTY} early"})
    output = slurm.directory / f"{job}.out"
    slurm.wait(
        lambda: output.exists() and "waiting for a signal" in output.read_text(), "the first step", job
    )  # SLURM lists it before it can be told
    slurm.cluster.run("scancel", "--signal=TERM", job)
    slurm.wait((slurm.directory / "run" / "slurm" / "alive").exists, "the ranks' step", job)
    slurm.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.ended(job)[-1] == ("COMPLETED", "0:0")
    assert slurm.field(job, "Restarts") == "2"
    assert events(slurm.directory / "run") == ["started", "requeued", "started", "finished"]


def test_a_wrong_key_ends_before_the_ranks_start(slurm: Slurm) -> None:
    job = slurm.sbatch("run", "loss.loss_typ=l2t")
    assert slurm.ended(job) == [("FAILED", "2:0")]
    assert "did you mean loss.loss_type" in (slurm.directory / f"{job}.out").read_text()


def test_two_jobs_share_a_node(slurm: Slurm) -> None:
    """Every job has its own rendezvous port."""
    jobs = [
        slurm.sbatch(
            name, "training.num_train_steps=5", "training.warmup_steps=0", options=("--nodes=1", "--ntasks-per-node=2")
        )
        for name in ("one", "two")
    ]
    assert [slurm.ended(job) for job in jobs] == [[("COMPLETED", "0:0")]] * 2


def test_a_frozen_rank_does_not_hold_the_nodes(slurm: Slurm, quiet: Losses) -> None:
    """The one that keeps the store. It ends by nothing but KILL, long before srun's --wait is over."""
    job = slurm.sbatch(
        "run",
        "training.sick_rank_timeout_seconds=15",
        env={"CYCLEVAE_PYTHON": f"{FAULTY} freeze", "CYCLEVAE_LINGER_SECONDS": "3"},
    )
    run = slurm.directory / "run"
    slurm.wait(lambda: "requeued" in events(run), "the requeue", job)
    assert "ending the ranks that are left" in (run / "slurm" / f"{job}.log").read_text()
    assert slurm.ended(job)[-1] == ("COMPLETED", "0:0")
    assert losses(run) == quiet


def test_a_signal_that_comes_with_every_start(overdue: dict[str, tuple[Slurm, str]]) -> None:
    """--signal at the time limit or above: each start saves, which counts as progress, so it would go on for ever."""
    slurm, job = overdue["saving"]
    assert slurm.ended(job)[-1][0] == "FAILED"
    assert events(slurm.directory / "run") == ["started", "requeued", "started", "failed"]
    assert "so the time limit leaves no time to train" in (slurm.directory / "run/slurm" / f"{job}.log").read_text()


def test_a_time_limit_of_a_minute(overdue: dict[str, tuple[Slurm, str]]) -> None:
    """The warning comes in time, and the job is requeued; so is one that does not end. SLURM by itself does neither."""
    for kind, reason in (("polite", "told to stop by SIGUSR1"), ("deaf", "time limit reached")):
        slurm, job = overdue[kind]
        run = slurm.directory / "run"
        slurm.wait(lambda run=run: len(events(run)) > 2, f"the restart of the {kind} job", job)  # type: ignore[misc]
        assert events(run)[:3] == ["started", "requeued", "started"]
        assert reason in (run / "slurm" / f"{job}.log").read_text()

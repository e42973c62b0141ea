"""hydra/launcher=slurm and `cyclevae slurm` on two nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_runs import ROOT, SMALL, STEPS, Losses, Slurm, losses

pytest_plugins = ["slurm_lab"]
pytestmark = pytest.mark.timeout(1200)
WAITING = f"hydra.launcher.python='{sys.executable} {ROOT}/tests/slurm/faulty.py wait'"
SWEPT = [one for one in SMALL if "train_batch_size" not in one]
TWO_NODES = ["hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=1"]


def cyclevae(slurm: Slurm, *arguments: str, check: bool = True) -> str:
    """Standard output of `cyclevae ARGUMENTS...`."""
    done = subprocess.run(
        [sys.executable, "-m", "job", *arguments],
        env=slurm.cluster.env,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done.stdout


def job_of(run: Path) -> str:
    return json.loads((run / "slurm" / "submission.json").read_text())["job"]


def test_a_sweep_larger_than_an_array_of_which_one_point_fails(slurm: Slurm, quiet: Losses) -> None:
    """MaxArraySize is 2. The point of batch size 3 cannot make batches of 4 of it."""
    command = [
        "-m",
        "job.train",
        "--multirun",
        "hydra/launcher=slurm",
        *TWO_NODES,
        *SWEPT,
        f"logging.save_dir={slurm.directory}",
        "logging.run_name=sweep",
        "training.global_batch_size=4",
        "training.train_batch_size=2,3,1",
    ]
    done = subprocess.run(
        [sys.executable, *command], env=slurm.cluster.env, cwd=ROOT, text=True, capture_output=True, timeout=600
    )
    sweep = slurm.directory / "sweep"
    runs = {size: sweep / f"training.train_batch_size={size}" for size in (1, 2, 3)}
    jobs = {size: job_of(run) for size, run in runs.items()}
    slurm.jobs.extend(jobs.values())
    assert {size: slurm.ended(job) for size, job in jobs.items()} == {
        1: [("COMPLETED", "0:0")],
        2: [("COMPLETED", "0:0")],
        3: [("FAILED", "1:0")],
    }
    assert jobs[2].endswith("_0")
    assert jobs[3].endswith("_1")
    assert "_" not in jobs[1], "the third point is a job of its own"
    assert done.returncode == 1
    assert "error: 1 of 3 runs did not finish" in done.stderr
    assert f"job {jobs[3]}: FAILED (exit code 1)  (training.train_batch_size=3)" in done.stdout
    assert "training.global_batch_size=4 is not a multiple of training.train_batch_size=3 x 2 processes" in done.stdout
    assert "no failure was recorded" not in done.stdout, "a rank said it in failures.jsonl"
    assert f"log: {runs[3]}/slurm/{jobs[3]}.log" in done.stdout
    assert losses(runs[2]) == quiet
    assert (sweep / "multirun.yaml").exists()


def test_the_submitter_is_killed(slurm: Slurm, quiet: Losses) -> None:
    run = slurm.directory / "run"
    submitter = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "job.train",
            "--multirun",
            "hydra/launcher=slurm",
            *TWO_NODES,
            *SMALL,
            f"logging.save_dir={slurm.directory}",
            "logging.run_name=run",
        ],
        env=slurm.cluster.env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert submitter.stdout is not None
    assert b"job " in submitter.stdout.readline()
    os.kill(submitter.pid, signal.SIGKILL)
    submitter.wait()
    slurm.jobs.append(job_of(run))
    assert slurm.ended(job_of(run)) == [("COMPLETED", "0:0")]
    assert losses(run) == quiet


def test_submit_status_logs_cancel_resume(slurm: Slurm, quiet: Losses) -> None:
    run = slurm.directory / "run"
    submitted = json.loads(
        cyclevae(
            slurm,
            "slurm",
            "submit",
            "--json",
            *TWO_NODES,
            WAITING,
            *SMALL,
            f"logging.save_dir={slurm.directory}",
            "logging.run_name=run",
        )
    )
    assert submitted == [{"job": job_of(run), "run": str(run)}]
    slurm.jobs.append(job_of(run))
    slurm.reached("run", 5, job_of(run))
    (status,) = json.loads(cyclevae(slurm, "slurm", "status", "--json", str(run)))
    assert (status["state"], status["alive"], status["restarts"], status["steps"]) == ("RUNNING", True, 0, STEPS)
    assert status["step"] >= 5
    assert status["loss"] > 0
    assert status["seconds_left"] is not None
    assert f"0: step 5/{STEPS}" in cyclevae(slurm, "slurm", "logs", "-n", "1000", str(run))
    again = cyclevae(slurm, "slurm", "resume", str(run), check=False)
    assert again == "", "it is running"
    cyclevae(slurm, "slurm", "cancel", str(run))
    assert slurm.ended(job_of(run))[-1][0] == "CANCELLED"
    cyclevae(slurm, "slurm", "resume", str(run))
    slurm.jobs.append(job_of(run))
    assert slurm.ended(job_of(run)) == [("COMPLETED", "0:0")]
    assert losses(run) == quiet
    assert "FINISHED" in cyclevae(slurm, "slurm", "list", str(slurm.directory))


def test_a_point_of_an_array_is_cancelled_and_resumed(slurm: Slurm, quiet: Losses) -> None:
    """The other goes on meanwhile."""
    submitted = json.loads(
        cyclevae(
            slurm,
            "slurm",
            "submit",
            "--json",
            *TWO_NODES,
            WAITING,
            *SWEPT,
            f"logging.save_dir={slurm.directory}",
            "logging.run_name=sweep",
            "training.train_batch_size=1,2",
        )
    )
    other, job = (one["job"] for one in submitted)
    run = Path(submitted[1]["run"])
    slurm.jobs.extend([other, job])
    slurm.reached(str(run), 5, job)
    cyclevae(slurm, "slurm", "cancel", str(run))
    assert slurm.ended(job)[-1][0] == "CANCELLED"
    assert slurm.field(other, "JobState") == "RUNNING"
    assert json.loads(cyclevae(slurm, "slurm", "resume", "--json", str(run))) == {str(run): job_of(run)}
    slurm.jobs.append(job_of(run))
    assert job_of(run) != job
    assert job_of(run).endswith("_1")
    assert slurm.ended(job_of(run)) == [("COMPLETED", "0:0")]
    assert losses(run) == quiet
    assert [one["state"] for one in json.loads(cyclevae(slurm, "slurm", "status", "--json", str(run)))] == ["FINISHED"]

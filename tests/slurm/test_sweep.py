"""hydra/launcher=slurm and `cyclevae slurm` on two nodes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from cluster import wait_for
from slurm_runs import ROOT, SMALL, STEPS, Losses, Slurm, events, losses

pytest_plugins = ["slurm_lab"]
pytestmark = pytest.mark.timeout(1200)
WAITING = f"hydra.launcher.python='{sys.executable} {ROOT}/tests/slurm/faulty.py wait'"
SWEPT = [one for one in SMALL if "train_batch_size" not in one]
TWO_NODES = ["hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=1"]


def cyclevae(slurm: Slurm, *arguments: str, check: bool = True, within: Sequence[str] = ()) -> str:
    """Standard output of `cyclevae ARGUMENTS...`, started by the command `within`."""
    done = subprocess.run(
        [*within, sys.executable, "-m", "job", *arguments],
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


def submit(slurm: Slurm, *arguments: str) -> list[dict[str, str]]:
    """Submit a run, or a sweep, on both nodes; returns what `cyclevae slurm submit --json` says: a job for each."""
    answer = cyclevae(slurm, "slurm", "submit", "--json", *TWO_NODES, f"logging.save_dir={slurm.directory}", *arguments)
    return json.loads(answer)


def test_a_sweep_larger_than_an_array_of_which_one_point_fails(slurm: Slurm, quiet: Losses) -> None:
    """MaxArraySize is 2. The point that wants a GPU finds none, which only its ranks can know."""
    command = [
        "-m",
        "job.train",
        "--multirun",
        "hydra/launcher=slurm",
        *TWO_NODES,
        *(one for one in SMALL if not one.startswith("training.device=")),
        f"logging.save_dir={slurm.directory}",
        "logging.run_name=sweep",
        "training.device=cpu,cuda,auto",
    ]
    done = subprocess.run(
        [sys.executable, *command], env=slurm.cluster.env, cwd=ROOT, text=True, capture_output=True, timeout=600
    )
    sweep = slurm.directory / "sweep"
    runs = {device: sweep / f"training.device={device}" for device in ("cpu", "cuda", "auto")}
    jobs = {device: job_of(run) for device, run in runs.items()}
    slurm.jobs.extend(jobs.values())
    assert {device: slurm.ended(job) for device, job in jobs.items()} == {
        "cpu": [("COMPLETED", "0:0")],
        "cuda": [("FAILED", "1:0")],
        "auto": [("COMPLETED", "0:0")],
    }
    assert jobs["cpu"].endswith("_0")
    assert jobs["cuda"].endswith("_1")
    assert "_" not in jobs["auto"], "the third point is a job of its own"
    assert done.returncode == 1
    assert "error: 1 of 3 runs did not finish" in done.stderr
    assert f"job {jobs['cuda']}: FAILED (exit code 1)  (training.device=cuda)" in done.stdout
    assert "training.device=cuda, but PyTorch sees no GPU here" in done.stdout
    assert "no failure was recorded" not in done.stdout, "a rank said it in failures.jsonl"
    assert f"log: {runs['cuda']}/slurm/{jobs['cuda']}.log" in done.stdout
    assert losses(runs["cpu"]) == quiet
    assert (sweep / "multirun.yaml").exists()

    # Again, one point at a time: the failing one does not keep the others from their turn, which are finished.
    again = [*command[:-1], "training.device=cuda,cpu,auto", "hydra.sweeper.max_batch_size=1"]
    done = subprocess.run(
        [sys.executable, *again], env=slurm.cluster.env, cwd=ROOT, text=True, capture_output=True, timeout=600
    )
    slurm.jobs.append(job_of(runs["cuda"]))
    assert done.returncode == 1
    assert "error: 1 of 1 runs did not finish" in done.stderr
    assert {device: job_of(runs[device]) for device in ("cpu", "auto")} == {key: jobs[key] for key in ("cpu", "auto")}
    assert [line.split("  ")[0] for line in done.stdout.splitlines() if line.startswith("finished already")] == [
        f"finished already: training.device={device}" for device in ("cpu", "auto")
    ]


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused_before_it_is_queued(slurm: Slurm) -> None:
    before = slurm.cluster.run("squeue", "--noheader", "--me")
    where = [*TWO_NODES, *SWEPT, f"logging.save_dir={slurm.directory}", "logging.run_name=sweep"]
    sizes = ["training.global_batch_size=4", "training.train_batch_size=2,3"]
    done = subprocess.run(
        [sys.executable, "-m", "job", "slurm", "submit", *where, *sizes],
        env=slurm.cluster.env,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.stderr
    assert (
        "on 2 nodes of 1: training.global_batch_size=4 is not a multiple of training.train_batch_size=3" in done.stderr
    )
    assert list(slurm.directory.rglob("submission.json")) == []
    assert slurm.cluster.run("squeue", "--noheader", "--me") == before


def test_a_node_that_loses_ranks_twice_is_excluded(slurm: Slurm, quiet: Losses) -> None:
    """Both ranks are on the first node, until it has lost one twice."""
    bad, good = slurm.cluster.names
    run = slurm.directory / "run"
    faulty = f"{sys.executable} {ROOT}/tests/slurm/faulty.py"
    (submitted,) = submit(
        slurm,
        *SMALL,
        "logging.run_name=run",
        "hydra.launcher.nodes=1",
        "hydra.launcher.tasks_per_node=2",
        f"hydra.launcher.python='env FAULTY_NODE={bad} {faulty} node'",
    )
    slurm.jobs.append(submitted["job"])
    assert slurm.ended(submitted["job"])[-1] == ("COMPLETED", "0:0")
    lines = [json.loads(line) for line in (run / "slurm" / "events.jsonl").read_text().splitlines()]
    assert [line["nodes"] for line in lines if line["event"] == "started"] == [bad, bad, good]
    (status,) = json.loads(cyclevae(slurm, "slurm", "status", "--json", str(run)))
    assert (status["lost_ranks"], status["excluded_nodes"]) == ({bad: 2}, [bad])
    assert f"excluded nodes: {bad}\n" in cyclevae(slurm, "slurm", "status", str(run))
    assert losses(run) == quiet


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_submitter_is_ended(how: signal.Signals, slurm: Slurm, quiet: Losses) -> None:
    """As by Ctrl-C, which needs no traceback: the job goes on."""
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
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert submitter.stdout is not None
    assert "job " in submitter.stdout.readline()
    slurm.jobs.append(job_of(run))
    slurm.reached("run", 1, job_of(run))
    submitter.send_signal(how)
    _, said = submitter.communicate(timeout=60)
    if how == signal.SIGINT:
        assert submitter.returncode == 128 + how
        assert "the jobs go on without this program" in said
    assert "Traceback" not in said
    assert slurm.ended(job_of(run)) == [("COMPLETED", "0:0")]
    assert losses(run) == quiet


def test_submit_status_logs_cancel_resume(slurm: Slurm, quiet: Losses) -> None:
    run = slurm.directory / "run"
    submitted = submit(slurm, WAITING, *SMALL, "logging.run_name=run")
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
    first = job_of(run)
    second = slurm.sbatch("run")
    assert slurm.ended(second) == [("FAILED", "1:0")]
    assert f"is being trained by job {first}" in (slurm.directory / f"{second}.out").read_text()
    assert cyclevae(slurm, "slurm", "cancel", "999999", check=False) == ""
    # At once, while the first still saves, and within another job's allocation, whose variables are not the new job's.
    assert cyclevae(slurm, "slurm", "cancel", str(run)) == f"cancelled job {first}\n"
    cyclevae(slurm, "slurm", "resume", str(run), within=["salloc", "--ntasks=1", "--cpus-per-task=1", "--mem=300"])
    assert slurm.ended(first)[-1][0] == "CANCELLED"
    slurm.jobs.append(job_of(run))
    assert slurm.ended(job_of(run)) == [("COMPLETED", "0:0")]
    assert losses(run) == quiet
    assert "FINISHED" in cyclevae(slurm, "slurm", "list", str(slurm.directory))


def test_a_point_of_an_array_is_cancelled_and_resumed(slurm: Slurm, quiet: Losses) -> None:
    """The other goes on meanwhile."""
    submitted = submit(slurm, WAITING, *SWEPT, "logging.run_name=sweep", "training.train_batch_size=1,2")
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


def test_the_last_point_is_requeued_like_all_and_a_controller_may_be_away(slurm: Slurm, quiet: Losses) -> None:
    """The last task of an array has the array's own id as SLURM_JOB_ID."""
    trigger = slurm.directory / "kill"
    faulty = f"{sys.executable} {ROOT}/tests/slurm/faulty.py kill-once"
    submitted = submit(
        slurm,
        f"hydra.launcher.python='env FAULTY_FILE={trigger} {faulty}'",
        *SWEPT,
        "logging.run_name=sweep",
        "training.global_batch_size=4",
        "training.train_batch_size=1,2",
    )
    jobs = {one["job"]: Path(one["run"]) for one in submitted}
    slurm.jobs.extend(jobs)
    for job, run in jobs.items():
        slurm.reached(str(run), 15, job)
    with slurm.cluster.controller_away():
        trigger.touch()
        wait_for(lambda: not any(alive(run) for run in jobs.values()), "the ranks to be gone")
        time.sleep(8)  # the batch steps ask in vain
    for job, run in jobs.items():
        assert slurm.ended(job)[-1] == ("COMPLETED", "0:0")
        assert events(run) == ["started", "requeued", "started", "finished"]
    assert losses(jobs[submitted[1]["job"]]) == quiet


def alive(run: Path) -> bool:
    return (run / "slurm" / "alive").exists()


def test_jobs_that_cannot_train_say_why_and_are_not_tried_again(slurm: Slurm) -> None:
    """Each is submitted by a process of its own, all at once."""
    taken = socket.create_server(("", 0))
    port = str(taken.getsockname()[1])
    cases: dict[str, tuple[list[str], dict[str, str], str]] = {
        "delay": (["hydra.launcher.signal_delay_s=700"], {}, "not below the time limit 00:10:00"),
        "setup": (["hydra.launcher.setup=['echo no such module >&2; exit 3']"], {}, "no such module"),
        "options": (["hydra.launcher.srun_args=[--nosuch]"], {}, "unrecognized option '--nosuch'"),
        "pyxis": (
            ["hydra/launcher=slurm_pyxis", "hydra.launcher.container.image=x.sqsh"],
            {},
            "unrecognized option '--container-image=x.sqsh'",
        ),
        "address": ([], {"MASTER_ADDR": "no.such.host"}, "MASTER_ADDR=no.such.host is no host"),
        "port": (["hydra.launcher.max_restarts=0"], {"MASTER_PORT": port}, f"port {port} of"),
        "held": (["+hydra.launcher.additional_parameters.hold=true"], {}, "exit code 0:0"),
    }
    submit = [sys.executable, "-m", "job", "slurm", "submit", "--config-name", "mmdit_cycle_vae"]
    where = [*TWO_NODES, *SMALL, f"logging.save_dir={slurm.directory}"]
    submitters = [
        subprocess.Popen(
            [*submit, *options, *where, f"logging.run_name={name}"],
            env=slurm.cluster.env | variables,
            cwd=ROOT,
        )
        for name, (options, variables, _) in cases.items()
    ]
    assert [submitter.wait() for submitter in submitters] == [0] * len(cases)
    runs = {name: slurm.directory / name for name in cases}
    jobs = {name: job_of(run) for name, run in runs.items()}
    slurm.jobs.extend(jobs.values())
    (held,) = json.loads(cyclevae(slurm, "slurm", "status", "--json", str(runs["held"])))
    assert (held["state"], held["reason"]) == ("PENDING", "JobHeldUser")
    cyclevae(slurm, "slurm", "cancel", str(runs["held"]))
    states = {name: "CANCELLED" if name == "held" else "FAILED" for name in cases}
    ended = {name: [state for state, _ in slurm.ended(job)] for name, job in jobs.items()}
    assert ended == {name: [state] for name, state in states.items()}, "each started once"
    for row in json.loads(cyclevae(slurm, "slurm", "list", "--json", str(slurm.directory))):
        name = Path(row["run"]).name
        assert row["state"] == states[name]
        assert cases[name][2] in row["reason"], name
    taken.close()

"""The first process of a pod: what it prepares, when it gives a run up, and what it says at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from schemas import ROOT

from job.errors import ExitCode, JobError, UserError
from job.launch.kubernetes import attempt as pod
from job.launch.kubernetes import container
from job.launch.kubernetes.container import MemoryGroup, diagnosis
from job.launch.kubernetes.status import recorded_failure
from job.launch.kubernetes.status_lines import last_progress


def attempt(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "job.launch.kubernetes.attempt", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_data_are_prepared_once_and_a_mistake_in_it_is_final(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "texts.txt").write_text("".join(f"A line of text with the number {number}.\n" for number in range(60)))
    prepare = [
        "--out",
        "data/mine",
        "--source",
        "texts.txt",
        "--vocab-size",
        "300",
        "--latent-dim",
        "4",
        "--validation-fraction",
        "0.2",
    ]
    first = attempt(tmp_path, "runs/r", "5", *prepare, "--", "--nproc-per-node=1", "--max-restarts=7", "x.py")
    assert first.returncode == ExitCode.USAGE, "torchrun was started, and refused its arguments"
    assert "training and" in first.stdout
    again = attempt(tmp_path, "runs/r", "5", *prepare, "--", "--max-restarts=7", "x.py")
    assert "finished already" in again.stdout
    wrong = attempt(tmp_path, "runs/r", "5", "--out", "data/other", "--source", "absent.txt", "--", "x.py")
    assert (wrong.returncode, "absent.txt" in wrong.stderr) == (ExitCode.FAILED, True)


def test_a_run_that_comes_no_further_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "kubernetes").mkdir()
    (tmp_path / "kubernetes" / "attempts.json").write_text('{"checkpoint": null, "trained": 1.0, "fruitless": 5}')
    done = attempt(tmp_path, str(tmp_path), "5", "--", "x.py")
    assert done.returncode == ExitCode.FAILED
    assert "6 starts in a row without a new checkpoint (max_restarts=5)" in done.stderr


def test_a_claim_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = attempt(tmp_path, f"{tmp_path}/file/run", "5", "--", "x.py")
    assert (done.returncode, "Traceback" in done.stderr, "fs_group" in done.stderr) == (ExitCode.FAILED, False, True)


def record(run_dir: Path, pod_index: int, **values: Any) -> None:
    """What a rank of a pod leaves that fails."""
    failure = {"time": 1.0, "rank": 0, "node": "n", "message": "m", "exit_code": 1, "consequence": False} | values
    path = run_dir / "kubernetes" / f"failures-{pod_index}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(failure) + "\n")


@pytest.fixture
def termination_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that Kubernetes puts into a container for its last words."""
    path = tmp_path / "termination-log"
    path.touch()
    monkeypatch.setattr(pod, "TERMINATION_LOG", path)
    monkeypatch.setenv("CYCLEVAE_POD_INDEX", "1")
    for name in ("CYCLEVAE_FAILURES", "CYCLEVAE_STATUS_LINES"):  # restored after the test
        monkeypatch.setenv(name, "")
    return path


def torchrun_ends(monkeypatch: pytest.MonkeyPatch, run_dir: Path, code: int, **failures: Any) -> None:
    """Torchrun whose ranks leave these failures, the message each, and end with `code`."""

    def run_module(_module: str, run_name: str) -> None:
        assert run_name == "__main__"
        assert os.environ["CYCLEVAE_FAILURES"] == f"{run_dir}/kubernetes/failures-1.jsonl"
        assert os.environ["CYCLEVAE_STATUS_LINES"] == "1"
        for number, (message, values) in enumerate(failures.items()):
            record(run_dir, 1, time=100.0 - number, message=message, **values)
        sys.exit(code)

    monkeypatch.setattr("runpy.run_module", run_module)
    monkeypatch.setattr("sys.argv", ["attempt", str(run_dir), "5", "--", "-m", "job.train"])


def test_the_first_cause_is_left_where_kubernetes_reads_it(
    tmp_path: Path, termination_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what another rank said of losing it, nor what an earlier pod of the same number left."""
    run_dir = tmp_path / "run"
    record(run_dir, 1, message="of an earlier pod", time=0.0)
    torchrun_ends(monkeypatch, run_dir, 1, later={}, cause={"rank": 3}, lost={"consequence": True})
    with pytest.raises(SystemExit) as ended:
        pod.main()
    assert ended.value.code == 1
    failure = recorded_failure(termination_log.read_text())
    assert failure is not None
    assert (failure.message, failure.rank) == ("cause", 3)


def test_a_long_message_fits_into_what_kubernetes_keeps(
    tmp_path: Path, termination_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun_ends(monkeypatch, tmp_path / "run", 1, **{"\N{GRINNING FACE}" * 5000: {}})
    with pytest.raises(SystemExit):
        pod.main()
    assert termination_log.stat().st_size < 4096
    assert recorded_failure(termination_log.read_text()) is not None


@pytest.mark.parametrize("code", [0, 143])
def test_an_end_without_a_failure_leaves_nothing(
    code: int, tmp_path: Path, termination_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun_ends(monkeypatch, tmp_path / "run", code)
    with pytest.raises(SystemExit) as ended:
        pod.main()
    assert (ended.value.code, termination_log.read_text()) == (code, "")


def test_a_run_that_is_given_up_says_so(tmp_path: Path, termination_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CYCLEVAE_POD_INDEX", "0")
    (tmp_path / "kubernetes").mkdir()
    (tmp_path / "kubernetes" / "attempts.json").write_text('{"checkpoint": null, "trained": 1.0, "fruitless": 5}')
    monkeypatch.setattr("sys.argv", ["attempt", str(tmp_path), "5", "--", "x.py"])
    with pytest.raises(SystemExit) as ended:
        pod.main()
    assert ended.value.code == ExitCode.FAILED
    failure = recorded_failure(termination_log.read_text())
    assert failure is not None
    assert "6 starts in a row without a new checkpoint" in failure.message
    assert not (tmp_path / "kubernetes" / "attempts.json").exists(), "a resume counts anew"


def memory_group(directory: Path, kills: int) -> None:
    """The files of a container's control group, as version 2 has them."""
    (directory / "memory.events").write_text(f"low 0\nhigh 0\nmax 9\noom 1\noom_kill {kills}\n")
    (directory / "memory.max").write_text(f"{2**30}\n")


def test_a_container_that_ran_out_of_memory_says_so(
    tmp_path: Path, termination_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks only know that one of them is gone; and the next start that is given up names it too."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "training_log.jsonl").write_text('{"step": 40}\n')
    memory_group(tmp_path, kills=3)
    memory = MemoryGroup.of_this_container(tmp_path)
    monkeypatch.setattr(pod.MemoryGroup, "of_this_container", lambda: memory)
    torchrun_ends(monkeypatch, run_dir, 134, lost={"consequence": True})
    ends = pod.train

    def killed_meanwhile(attempt: pod.Attempt) -> None:
        memory_group(tmp_path, kills=4)
        ends(attempt)

    monkeypatch.setattr(pod, "train", killed_meanwhile)
    with pytest.raises(SystemExit) as ended:
        pod.main()
    assert ended.value.code == 134
    failure = recorded_failure(termination_log.read_text())
    assert failure is not None
    assert failure.message.startswith("out of memory after step 40: the container came to its limit of 1Gi")
    again = pod.attempt_of(["run", "5", "--"])
    again = pod.Attempt(run_dir, again.max_restarts, [], [], "1")
    assert "out of memory after step 40" in str(pod.how_it_ended(again))


def test_kills_of_before_are_not_this_starts(tmp_path: Path) -> None:
    memory_group(tmp_path, kills=3)
    memory = MemoryGroup.of_this_container(tmp_path)
    assert diagnosis(memory, 3, tmp_path) is None
    assert str(diagnosis(memory, 2, tmp_path)).startswith("out of memory: the container")


def test_memory_under_version_1(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{3 * 2**29}\n")
    memory = MemoryGroup.of_this_container(tmp_path)
    assert (memory.kills(), memory.limit_in_words()) == (2, "1.5Gi")


def test_a_full_place_to_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MemoryGroup.of_this_container(tmp_path)
    monkeypatch.setattr(container, "is_full", lambda place: place == "/dev/shm")
    assert diagnosis(memory, 0, tmp_path) == "/dev/shm is full; raise hydra.launcher.shm_gb"


def test_a_container_that_was_killed_as_a_whole_is_told_of_by_the_next(tmp_path: Path) -> None:
    attempt = pod.Attempt(tmp_path, 0, [], [], "0")
    assert pod.how_it_ended(attempt) is None, "the first start"
    pod.begin(attempt)
    assert "its container was killed as a whole" in str(pod.how_it_ended(attempt))
    (tmp_path / "kubernetes" / "attempts.json").write_text('{"checkpoint": null, "trained": 1.0, "fruitless": 1}')
    with pytest.raises(JobError, match=r"2 starts in a row .*; the last one: its container was killed as a whole"):
        pod.begin(attempt)


def test_a_pod_tells_at_once_where_its_run_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "training_log.jsonl").write_text('{"step": 40, "loss": 2.5}\n')
    (tmp_path / "config.yaml").write_text("training: {num_train_steps: 80}\n")
    pod.begin(pod.Attempt(tmp_path, 5, [], [], "0"))
    assert last_progress(capsys.readouterr().out) == {"cyclevae": "progress", "step": 40, "steps": 80, "loss": 2.5}


def test_a_pod_without_arguments_trains_the_run_that_is_called_like_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CYCLEVAE_JOB", "mine")
    monkeypatch.setenv("CYCLEVAE_ARGUMENTS", "--config-name demo 'loss.cycle_text_weight=0.1'")
    monkeypatch.setenv("CYCLEVAE_POD_INDEX", "1")
    found = pod.attempt_of([])
    assert (str(found.run_dir), found.pod_index, found.prepare) == ("/runs/mine", "1", [])
    assert found.torchrun == [
        *("-m", "job.train", "--config-name", "demo", "loss.cycle_text_weight=0.1"),
        *("logging.run_name=mine", "monitoring.port=9400"),
    ]
    monkeypatch.setenv("CYCLEVAE_ARGUMENTS", "'open")
    with pytest.raises(UserError, match="CYCLEVAE_ARGUMENTS"):
        pod.attempt_of([])
    monkeypatch.delenv("CYCLEVAE_JOB")
    with pytest.raises(UserError, match="neither arguments nor CYCLEVAE_JOB"):
        pod.attempt_of([])


@pytest.mark.parametrize(
    ("index", "given", "found"),
    [
        ("0", "join_timeout=600", "join_timeout=600,is_host=true"),
        ("1", "join_timeout=600", "join_timeout=600,is_host=false"),
        ("1", "", "is_host=false"),
        ("1", "is_host=1", "is_host=1"),
        (None, "join_timeout=600", "join_timeout=600"),
    ],
)
def test_the_first_pod_hosts_the_store(
    index: str | None, given: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network that pods share, torchrun would take whichever comes first; a pod that is not ours is left alone."""
    monkeypatch.setenv("PET_RDZV_BACKEND", "c10d")
    monkeypatch.setenv("PET_RDZV_CONF", given)
    monkeypatch.delenv("CYCLEVAE_POD_INDEX", raising=False)
    if index is not None:
        monkeypatch.setenv("CYCLEVAE_POD_INDEX", index)
    pod.choose_store_host()
    assert os.environ["PET_RDZV_CONF"] == found

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

from job.errors import ExitCode
from job.launch.kubernetes import attempt as pod
from job.launch.kubernetes.status import recorded_failure


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

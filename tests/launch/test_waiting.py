"""Waiting for jobs: what is shown, how it ends, and that a signal ends the waiting alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_directories import run_directory

from job import command
from job.errors import ExitCode
from job.launch import waiting
from job.launch.waiting import Outcome, compare_runs, show_changes, summarize


def test_changes_of_our_jobs_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    snapshots = [
        {"1": "PENDING", "9": "RUNNING"},
        {"1": "PENDING"},
        {"1": "RUNNING", "2": "PENDING"},
        {},
        {"2": "RUNNING"},
    ]
    show_changes({"1": "a=1", "2": "a=2"}, snapshots)
    assert capsys.readouterr().out.splitlines() == [
        "job 1: PENDING  (a=1)",
        "job 1: RUNNING  (a=1)",
        "job 2: PENDING  (a=2)",
        "job 2: RUNNING  (a=2)",
    ]


def test_the_summary_of_a_sweep(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch with a failed run does not keep the next ones from being submitted; the command fails at its end."""
    monkeypatch.setattr(waiting, "ended", [])
    finished = Outcome("1", "a=1", "COMPLETED", None, "1.log")
    failed = Outcome("2", "a=2", "FAILED (exit code 1)", "rank 1 (n): out of memory", "2.log")

    def sweep() -> None:
        for batch in ([finished, failed], [Outcome("3", "a=3", "DELETED", None, "3.log")]):
            summarize(batch)

    assert command.guarded(sweep) == ExitCode.FAILED
    printed = capsys.readouterr()
    assert "error: 2 of 3 runs did not finish" in printed.err
    assert printed.out.splitlines() == [
        "job 1: COMPLETED  (a=1)",
        "job 2: FAILED (exit code 1)  (a=2)",
        "    rank 1 (n): out of memory",
        "    log: 2.log",
        "job 3: DELETED  (a=3)",
        "    no message",
        "    log: 3.log",
    ]


def test_runs_that_were_waited_for_are_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over all batches; of pods' directories it is only told where to compare them."""
    monkeypatch.setattr(waiting, "ended", [])
    monkeypatch.setattr(waiting, "waited_for", [])
    runs = [run_directory(tmp_path / name, evaluations={100: {"l2t/ce": 1.0}}) for name in ("a", "b")]
    for run in runs:
        summarize([Outcome("1", run.name, "COMPLETED", None, "log")], [run])
    compare_runs()
    assert "2 runs, 1 setting, 1 seed" in capsys.readouterr().out
    monkeypatch.setattr(waiting, "waited_for", [Path("/runs/s/a"), Path("/runs/s/b")])
    compare_runs()
    assert capsys.readouterr().out == (
        "their directories are not on this machine; where they are: cyclevae compare /runs/s\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_the_waiting_and_names_the_way_to_the_jobs(number: signal.Signals) -> None:
    code = f"""
import os
from job.launch.waiting import leave_jobs_on_signals
leave_jobs_on_signals("cyclevae slurm")
try:
    os.kill(os.getpid(), {int(number)})
finally:
    print("cleaned up")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == (
        "the jobs go on without this program: see `cyclevae slurm list`, end them with `cyclevae slurm cancel`\n"
    )

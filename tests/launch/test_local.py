"""Points of a sweep on this machine: how many at a time, what each is given, and what a signal does."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job import command
from job.config import Config
from job.errors import ExitCode
from job.launch import waiting
from job.launch.local import sweep
from job.launch.points import Point

# What a point does here in place of training: it notes its beginning and its end, and stops for SIGTERM as a run does.
POINT = """
import os, signal, sys, time
def note(event):
    with open(sys.argv[1], "a") as file:
        print(event, time.time(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
def stop(*_):
    note("stopped")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
note("started")
time.sleep(float(sys.argv[2]))
note("ended")
print("the last words")
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture(autouse=True)
def _points_that_need_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "command", lambda point: [sys.executable, "-c", POINT, *point.arguments])
    monkeypatch.setattr(waiting, "ended", [])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture(autouse=True)
def _signals_of_this_test_alone() -> Iterator[None]:
    """A test before may have let job.train watch this process's signals, of which a second one ends it."""
    before = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(before)


def points(directory: Path, *seconds_and_codes: tuple[float, int]) -> list[Point]:
    return [
        Point(directory / str(number), directory, str(number), [str(directory / "events"), *map(str, given)], Config())
        for number, given in enumerate(seconds_and_codes)
    ]


def events(directory: Path) -> list[list[str]]:
    return [line.split() for line in (directory / "events").read_text().splitlines()]


def test_so_many_at_a_time_each_with_its_share_of_the_machine(tmp_path: Path) -> None:
    outcomes = sweep.train(points(tmp_path, *[(0.5, 0)] * 5), 2, ["3", "5"])
    assert [(outcome.point, outcome.state) for outcome in outcomes] == [(str(n), "COMPLETED") for n in range(5)]
    running, most = 0, 0
    for event, _, threads, gpu in sorted(events(tmp_path), key=lambda event: float(event[1])):
        running += 1 if event == "started" else -1
        most = max(most, running)
        assert threads == str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert gpu in ("3", "5")
    assert most == 2


def test_a_point_that_fails_does_not_keep_others_from_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_them = points(tmp_path, (0, 1), (0, 0))
    assert command.guarded(lambda: waiting.summarize(sweep.train(of_them, 1, []))) == ExitCode.FAILED
    printed = capsys.readouterr()
    assert "FAILED (exit code 1)  (0)\n    no failure was recorded; the last lines of the log:\n" in printed.out
    assert "the last words" in printed.out
    assert "COMPLETED  (1)" in printed.out
    assert "1 of 2 runs did not finish" in printed.err


def test_a_signal_lets_the_points_save_and_starts_no_further_one(tmp_path: Path) -> None:
    of_them = points(tmp_path, *[(60, 0)] * 3)
    signals = iter([signal.SIGTERM])  # one: a second ends this process at once

    def stop_when_two_have_started(seconds: float) -> None:
        if (tmp_path / "events").exists() and len(events(tmp_path)) == 2:
            for number in signals:
                os.kill(os.getpid(), number)
        time.sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "time", type("", (), {"sleep": staticmethod(stop_when_two_have_started)}))
        code = command.guarded(lambda: waiting.summarize(sweep.train(of_them, 2, [])))
    assert code == ExitCode.STOPPED
    assert sorted(event for event, *_ in events(tmp_path)) == ["started", "started", "stopped", "stopped"]


def test_the_commands_of_a_sweep() -> None:
    """As a user gives it; the commands are those that a shell would run."""
    arguments = ["--multirun", "hydra/launcher=local", "hydra.launcher.dry_run=true", "data=synthetic"]
    done = subprocess.run(
        [sys.executable, "-m", "job.train", *arguments, "training.seed=1,2", "optimizer.lr=0.001,0.002"],
        capture_output=True,
        text=True,
        check=True,
    )
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(commands) == 4
    assert all(words[1:3] == ["-m", "job.train"] for words in commands)
    assert {tuple(sorted(set(words) & {"training.seed=1", "training.seed=2"})) for words in commands} == {
        ("training.seed=1",),
        ("training.seed=2",),
    }
    assert not any("launcher" in word for words in commands for word in words)

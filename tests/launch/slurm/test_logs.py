"""`cyclevae slurm logs`, without a cluster."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from job import slurm
from job.launch.slurm import logs
from job.launch.slurm.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "7.log").write_text("slurm: started\n0: a\n1: b\n11: c\n 1: d\n01: e\n")
    note(tmp_path, "7", 1)
    return RunDirectory(tmp_path)


def note(path: Path, job: str, time: float) -> None:
    (path / "slurm" / "submission.json").write_text(json.dumps({"job": job, "time": time}))


def test_the_lines_of_a_rank(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm.main(["logs", "--rank", "1", "-n", "2", str(run.path)]) == 0
    assert capsys.readouterr().out == " 1: d\n01: e\n"
    assert slurm.main(["logs", "-n", "1", str(run.path)]) == 0
    assert capsys.readouterr().out == "01: e\n"


def test_before_the_job_has_started(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    note(run.path, "8", 2)
    assert slurm.main(["logs", str(run.path)]) == 1
    assert "the job has not started" in capsys.readouterr().err


def test_following_into_the_next_job(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is only half there is not shown yet."""
    added = ["0: more\n0: ha", "lf\n", ""]

    def meanwhile(_seconds: float) -> None:
        text = added.pop(0)
        with (run.path / "slurm" / "7.log").open("a") as file:
            file.write(text)
        if not text:
            (run.path / "slurm" / "8.log").write_text("0: next\n1: other\n")
            note(run.path, "8", 2)

    monkeypatch.setattr("time.sleep", meanwhile)
    log = run.log()
    lines = logs.follow(run, log, log.stat().st_size, rank=0)
    assert list(islice(lines, 3)) == ["0: more", "0: half", "0: next"]


@pytest.mark.parametrize("event", ["finished", "failed"])
def test_following_ends_with_the_run(run: RunDirectory, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before the last line of the batch step, which comes after the event."""
    monkeypatch.setattr("time.sleep", lambda _: (run.path / "slurm" / "7.log").open("a").write("slurm: the end\n"))
    events = [{"time": 2, "job": "7", "event": "started"}, {"time": 3, "job": "7", "event": event}]
    (run.path / "slurm" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    log = run.log()
    lines = list(islice(logs.follow(run, log, log.stat().st_size, rank=None), 9))
    assert lines[0] == "slurm: the end"
    assert len(lines) < 9

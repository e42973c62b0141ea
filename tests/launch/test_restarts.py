"""The rule of job/launch/restarts.py, in bash and in Python, by one table of cases."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from job import checkpoint_names
from job.launch.restarts import fruitless_restarts
from job.launch.slurm.job_script import BAD_NODES, BATCH

# What a start brings, before something interrupts it: nothing (-), a new checkpoint (c), an unfinished one (t), or not
# even that its ranks meet (w). Then max_restarts, and how many of the starts there are until the run is given up.
CASES = [
    # starts, max_restarts, on SLURM, on Kubernetes
    ("------", 2, 3, 3),  # a start and two restarts
    ("------", 0, 1, 1),
    ("c-----", 2, 3, 4),  # the first start from a checkpoint does not count on Kubernetes
    ("-c----", 2, 4, 5),
    ("cccccc", 1, 6, 6),  # never given up: every start brings a checkpoint
    ("-c-c-c", 2, 6, 6),
    ("--c---", 2, 5, 6),
    ("tttttt", 2, 3, 3),  # what a kill cut short is no checkpoint
    ("wwwwww", 2, 3, 6),  # pods are made again while others are missing
    ("-w-w--", 2, 3, 5),
]
Starts = Callable[[Path, str, int], int]


def a_start(run_dir: Path, brings: str, number: int) -> None:
    """What the ranks leave in the run directory."""
    if brings != "w":
        (run_dir / "environment.json").write_text("{}")
        os.utime(run_dir / "environment.json", (0, number))
    name = checkpoint_names.directory_name(99_999_990 + 10 * number)  # from the second on, a digit more than usual
    if brings == "c":
        (run_dir / checkpoint_names.DIRECTORY / name).mkdir(parents=True)
    elif brings == "t":
        (run_dir / checkpoint_names.DIRECTORY / f"{name}{checkpoint_names.TEMPORARY}").mkdir(parents=True)


def starts_on_slurm(run_dir: Path, starts: str, max_restarts: int) -> int:
    """The batch step decides at the end of a start."""
    for number, brings in enumerate(starts):
        a_start(run_dir, brings, number)
        script = f"""
            scontrol() {{ touch {run_dir}/requeued; }}
            source {BATCH}; source {BAD_NODES}
            run_dir={run_dir} notes={run_dir} max_restarts={max_restarts}
            requeue "exit code 134" 134"""
        subprocess.run(["bash", "-c", script], check=True, capture_output=True, env=os.environ | {"SLURM_JOB_ID": "7"})
        if not (run_dir / "requeued").exists():
            return number + 1
        (run_dir / "requeued").unlink()
    return len(starts)


def starts_on_kubernetes(run_dir: Path, starts: str, max_restarts: int) -> int:
    """The first pod decides when it begins."""
    for number, brings in enumerate(starts):
        if fruitless_restarts(run_dir, run_dir / "attempts.json") > max_restarts:
            return number
        a_start(run_dir, brings, number)
    return len(starts)


@pytest.mark.parametrize(("starts", "max_restarts", "on_slurm", "on_kubernetes"), CASES)
@pytest.mark.parametrize("launcher", ["slurm", "kubernetes"])
def test_a_run_that_comes_no_further_is_given_up(
    launcher: str, starts: str, max_restarts: int, on_slurm: int, on_kubernetes: int, tmp_path: Path
) -> None:
    implementations: dict[str, tuple[Starts, int]] = {
        "slurm": (starts_on_slurm, on_slurm),
        "kubernetes": (starts_on_kubernetes, on_kubernetes),
    }
    count, expected = implementations[launcher]
    assert count(tmp_path, starts, max_restarts) == expected


def test_a_job_that_is_submitted_anew_counts_from_zero(tmp_path: Path) -> None:
    """On SLURM by the job's number. On Kubernetes the count is removed when the run is given up (attempt.py)."""
    assert starts_on_slurm(tmp_path, "----", 1) == 2
    where = f"run_dir={tmp_path} notes={tmp_path}"
    script = f"scontrol() {{ :; }}; source {BATCH}; source {BAD_NODES}; {where} max_restarts=1; requeue because 134"
    subprocess.run(["bash", "-c", script], check=True, capture_output=True, env=os.environ | {"SLURM_JOB_ID": "8"})
    assert (tmp_path / "restarts").read_text() == "8 none 1 0\n"


def test_notes_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """Runs go on over an upgrade, and keep their count."""
    (tmp_path / "checkpoints" / "step_00000090").mkdir(parents=True)
    (tmp_path / "restarts").write_text("7 step_00000090 2\n")
    assert starts_on_slurm(tmp_path, "---", 3) == 2
    (tmp_path / "attempts.json").write_text(json.dumps({"checkpoint": 90, "trained": 0.5, "fruitless": 5}) + "\n")
    assert fruitless_restarts(tmp_path, tmp_path / "attempts.json") == 6


def test_restarts_in_numbers(tmp_path: Path) -> None:
    """What is noted and said: on SLURM the number of restarts from the checkpoint, on Kubernetes that of starts."""

    def started(trained: bool = True) -> int:
        restarts = fruitless_restarts(tmp_path, tmp_path / "kubernetes" / "attempts.json")
        if trained:
            (tmp_path / "environment.json").write_text("{}")
            os.utime(tmp_path / "environment.json", (0, next(seconds)))
        return restarts

    seconds = itertools.count(1)
    assert [started() for _ in range(3)] == [0, 1, 2]
    assert [started(trained=False) for _ in range(3)] == [3, 3, 3], "nothing counts while other nodes are waited for"
    (tmp_path / "checkpoints" / "step_000000090").mkdir(parents=True)
    assert [started() for _ in range(2)] == [0, 1]
    (tmp_path / "checkpoints" / "step_000000100").mkdir()
    assert started() == 0


def test_what_the_batch_step_notes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    script = f"""
        scontrol() {{ if [ "$1" = requeue ]; then echo requeued; fi >&2; }}
        SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n1
        source {BATCH}; source {BAD_NODES}
        run_dir={run} notes={run}/slurm max_restarts=2
        for checkpoint in none step_00000010 step_00000010 step_00000020.tmp step_00000020; do
            mkdir -p {run}/checkpoints/$checkpoint
            requeue "exit code 134" 134
        done"""
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)
    events = [json.loads(line) for line in (run / "slurm" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["requeued", "requeued", "requeued", "failed", "requeued"]
    assert events[3]["reason"] == "exit code 134; not requeued: 2 restarts without a new checkpoint, max_restarts=2"
    assert events[4]["reason"] == "exit code 134; restart 1 of at most 2 from checkpoint step_00000020"

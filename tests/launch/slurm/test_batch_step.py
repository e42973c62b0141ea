"""The batch step's decisions, in bash, with a scontrol that answers what it is told to: no cluster needed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from job.launch.slurm.job_script import BATCH

SCONTROL = """
scontrol() {
    if [ "$1" = requeue ]; then echo "$2" >>requeued; return 0; fi
    state=$([ -e requeued ] && echo PENDING || echo "${STATE:-RUNNING}")
    echo "JobId=7 JobState=$state Reason=${REASON:-None} Restarts=0"
}
"""


def run(directory: Path, body: str, **variables: str) -> tuple[int, list[str], bool]:
    """Exit code of a batch script, what it noted, and whether it requeued its job."""
    (directory / "targets").mkdir(exist_ok=True)
    for job in ("7", "8"):
        (directory / "targets" / f"cyclevae-run@{job}.json").touch()
    done = subprocess.run(
        ["bash", "-c", f"{SCONTROL} source {BATCH}\n{body}"],
        cwd=directory,
        capture_output=True,
        timeout=120,
        env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", **variables},
    )
    events = directory / "run" / "slurm" / "events.jsonl"
    notes = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    return (
        done.returncode,
        [f"{note['event']}: {note['reason']}" for note in notes[1:]],
        (directory / "requeued").exists(),
    )


@pytest.mark.parametrize(
    ("code", "state", "event", "requeued"),
    [
        (0, "RUNNING", "finished: exit code 0", False),
        (1, "RUNNING", "failed: exit code 1: a retry will not mend it", False),
        (127, "RUNNING", "failed: exit code 127: a retry will not mend it", False),
        (134, "RUNNING", "requeued: exit code 134; restart 1 of at most 5 from checkpoint none", True),
        (135, "RUNNING", "requeued: srun could not run the tasks; restart 1 of at most 5 from checkpoint none", True),
        (143, "CANCELLED", "stopped: exit code 143; SLURM decides, state CANCELLED", False),
    ],
)
def test_the_exit_code_decides(code: int, state: str, event: str, requeued: bool, tmp_path: Path) -> None:
    assert run(tmp_path, f"supervise run targets 5 bash -c 'exit {code}'", STATE=state) == (code, [event], requeued)
    assert not (tmp_path / "run" / "slurm" / "alive").exists()
    assert [path.name for path in (tmp_path / "targets").iterdir()] == ["cyclevae-run@8.json"]


def test_a_signal_before_the_ranks_are_started(tmp_path: Path) -> None:
    code, events, requeued = run(tmp_path, "kill -USR1 $$\nsupervise run targets 5 touch ran")
    assert (code, requeued) == (143, True)
    assert events == ["requeued: told to stop by SIGUSR1, exit code 143; restart 1 of at most 5 from checkpoint none"]
    assert not (tmp_path / "ran").exists()


MET = "run/environment.json"  # what rank 0 writes once the ranks have met


def signalled(signal: str, ranks: str, sign: str = MET) -> str:
    """The batch step over ranks that make a file, and then get a signal."""
    return f'(until [ -e {sign} ]; do sleep 0.05; done; kill -{signal} $$) &\nsupervise run targets 5 bash -c "{ranks}"'


@pytest.mark.parametrize("signal", ["USR1", "USR2", "TERM"])
def test_every_signal_reaches_the_ranks_as_usr1(signal: str, tmp_path: Path) -> None:
    ranks = f"trap 'exit 143' USR1; touch {MET}; for _ in {{1..600}}; do sleep 0.05; done"
    code, events, _ = run(tmp_path, signalled(signal, ranks))
    assert code == 143
    assert events == [
        f"requeued: told to stop by SIG{signal}, exit code 143; restart 1 of at most 5 from checkpoint none"
    ]


def test_ranks_that_have_not_met_are_not_told_yet(tmp_path: Path) -> None:
    ranks = f"touch early; sleep 2; trap 'exit 143' USR1; touch {MET}; for _ in {{1..600}}; do sleep 0.05; done"
    assert run(tmp_path, signalled("USR1", ranks, "early"))[0] == 143


def test_further_signals_end_nothing(tmp_path: Path) -> None:
    ranks = (
        f"trap 'touch told$((++told))' USR1; touch {MET}; "
        "for _ in {1..600}; do [ -e told3 ] && exit 143; sleep 0.05; done"
    )
    signs = {MET: "USR1", "told1": "USR2", "told2": "TERM"}
    signals = "".join(
        f"until [ -e {sign} ]; do sleep 0.05; done; kill -{signal} $$; " for sign, signal in signs.items()
    )
    code, events, _ = run(
        tmp_path, f'({signals}) &\nsupervise run targets 5 bash -c "{ranks.replace("$", chr(92) + "$")}"'
    )
    assert code == 143
    assert events == ["requeued: told to stop by SIGUSR1, exit code 143; restart 1 of at most 5 from checkpoint none"]


def test_restarts_are_those_of_one_job(tmp_path: Path) -> None:
    for job, requeued in (("7", True), ("7", False), ("8", True)):
        (tmp_path / "requeued").unlink(missing_ok=True)
        assert run(tmp_path, "supervise run targets 1 bash -c 'exit 134'", SLURM_JOB_ID=job)[2] is requeued


def test_a_time_limit_requeues_before_the_ranks_have_ended(tmp_path: Path) -> None:
    ranks = f"trap '' USR1; touch {MET}; for _ in {{1..600}}; do [ -e requeued ] && break; sleep 0.05; done; exit 137"
    code, events, _ = run(tmp_path, signalled("TERM", ranks), REASON="TimeLimit")
    assert code == 137
    assert events == ["requeued: time limit reached; restart 1 of at most 5 from checkpoint none"]
    assert (tmp_path / "requeued").read_text() == "7\n"


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(143, "", True), (143, "100", False), (1, "", False)])
def test_what_comes_before_the_ranks(code: int, restarts: str, requeued: bool, tmp_path: Path) -> None:
    assert run(tmp_path, f"interrupted_early {code}", SLURM_RESTART_COUNT=restarts) == (code, [], requeued)


def test_a_refused_requeue_is_noted(tmp_path: Path) -> None:
    says = 'echo \'job "7" is not "requeuable"\'; return 1'
    refuse = f'scontrol() {{ if [ "$1" = requeue ]; then {says}; fi; echo JobState=RUNNING; }}'
    _, events, _ = run(tmp_path, f"{refuse}\nsupervise run targets 5 bash -c 'exit 134'")
    assert events[-1] == "failed: cannot be requeued: job 7 is not requeuable"


def test_failures_are_those_of_the_last_start(tmp_path: Path) -> None:
    """Every rank finds the file in its environment, also one that a container's entry starts; an earlier start's go."""
    rank = "supervise run targets 5 bash -c 'echo start$0 >>$CYCLEVAE_FAILURES; exit 134'"
    failures = tmp_path / "run" / "slurm" / "failures.jsonl"
    for start in ("1", "2"):
        run(tmp_path, f"{rank} {start}")
        assert failures.read_text() == f"start{start}\n"


def test_a_requeue_that_ends_scontrol_too_is_no_refusal(tmp_path: Path) -> None:
    """SLURM ends every process of a job that it requeues, at times also the scontrol that has asked for it."""
    ended = 'scontrol() { if [ "$1" = requeue ]; then kill -TERM $BASHPID; fi; echo JobState=RUNNING; }'
    _, events, _ = run(tmp_path, f"{ended}\nsupervise run targets 5 bash -c 'exit 134'")
    assert events == ["requeued: exit code 134; restart 1 of at most 5 from checkpoint none"]

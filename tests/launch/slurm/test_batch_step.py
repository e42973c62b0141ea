"""The batch step's decisions, in bash, with a scontrol that answers what it is told to: no cluster needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.launch.slurm.job_script import BAD_NODES, BATCH

SCONTROL = """
scontrol() {
    if [ "$1" = requeue ]; then echo "$2" >>requeued; return 0; fi
    state=$([ -e requeued ] && echo PENDING || echo "${STATE:-RUNNING}")
    echo "JobId=7 JobState=$state Reason=${REASON:-None} Restarts=0 TimeLimit=${LIMIT:-1-00:00:00}"
}
squeue() { printf '%s\\n' "$QUEUE" "$job RUNNING"; }
"""


def run(directory: Path, body: str, **variables: str) -> tuple[int, list[str], bool]:
    """Exit code of a batch script, what it noted, and whether it requeued its job."""
    (directory / "targets").mkdir(exist_ok=True)
    for job in ("7", "8"):
        (directory / "targets" / f"cyclevae-run@{job}.json").touch()
    done = subprocess.run(
        ["bash", "-c", f"{SCONTROL} source {BATCH}; source {BAD_NODES}\npoll=0.1 patience=2\n{body}"],
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
        (255, "RUNNING", "failed: exit code 255: srun refused its options, see the log", False),
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


ARRAY = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}  # the last task has the array's id


def test_the_last_task_of_an_array_is_named_by_both_numbers(tmp_path: Path) -> None:
    """SLURM_JOB_ID alone means all tasks to scontrol, whose states are then several lines."""
    both = """
        scontrol() {
            if [ "$1" = requeue ]; then echo "$2" >>requeued; return 0; fi
            if [ "${!#}" = 7 ]; then printf 'JobState=COMPLETED\\nJobState=RUNNING\\n'; else echo JobState=RUNNING; fi
        }"""
    _, events, _ = run(tmp_path, f"{both}\nsupervise run targets 5 bash -c 'exit 134'", **ARRAY)
    assert events == ["requeued: exit code 134; restart 1 of at most 5 from checkpoint none"]
    assert (tmp_path / "requeued").read_text() == "7_3\n"


def test_a_controller_that_is_away_is_asked_again(tmp_path: Path) -> None:
    """For the state of the job, and for the requeue: both fail twice."""
    away = """
        scontrol() {
            echo "$1" >>asked
            case $(wc -l <asked) in 1 | 2 | 4 | 5) echo "Unable to contact slurm controller" >&2; return 1 ;; esac
            if [ "$1" = requeue ]; then touch requeued; else echo JobState=RUNNING; fi
        }"""
    _, events, requeued = run(tmp_path, f"{away}\nsupervise run targets 5 bash -c 'exit 134'")
    assert requeued
    assert events == ["requeued: exit code 134; restart 1 of at most 5 from checkpoint none"]


def test_a_controller_that_stays_away_is_named(tmp_path: Path) -> None:
    _, events, _ = run(tmp_path, "scontrol() { return 1; }\nsupervise run targets 5 bash -c 'exit 134'")
    assert events == ["failed: exit code 134; not requeued: the controller has not answered for 2 s"]


def test_slurms_words_do_not_break_the_line_of_json(tmp_path: Path) -> None:
    body = r"""run_dir=run notes=run/slurm; mkdir -p run/slurm; note first a; note second $'a "b"\n\tc\\d'"""
    assert run(tmp_path, body)[1] == ["second: a b  cd"]


def test_one_job_has_the_run(tmp_path: Path) -> None:
    """A second job of it ends at once and is no part of the run's story; one that is over gives it free."""
    ranks = "supervise run targets 5 true"
    assert run(tmp_path, ranks)[0] == 0
    code, events, _ = run(tmp_path, ranks, SLURM_JOB_ID="8", QUEUE="7 RUNNING")
    assert code == 1
    assert events[-1] == "refused: run is being trained by job 7"
    assert run(tmp_path, ranks, SLURM_JOB_ID="7", QUEUE="")[0] == 0, "its own requeue"
    assert run(tmp_path, ranks, SLURM_JOB_ID="9", QUEUE="70 RUNNING")[0] == 0
    assert (tmp_path / "run" / "slurm" / "job").read_text() == "9\n"


def test_a_job_that_saves_is_waited_for(tmp_path: Path) -> None:
    assert run(tmp_path, "supervise run targets 5 true")[0] == 0
    ends = "squeue() { [ -e over ] || echo 7 COMPLETING; echo 8 RUNNING; touch over; }\n"
    assert run(tmp_path, f"{ends}supervise run targets 5 true", SLURM_JOB_ID="8")[0] == 0


@pytest.mark.parametrize(("limit", "trains"), [("00:03:00", False), ("00:03:01", True), ("UNLIMITED", True)])
def test_a_time_limit_that_leaves_no_time(limit: str, trains: bool, tmp_path: Path) -> None:
    """It would be told to stop as soon as it starts, save, and be requeued without end."""
    code, events, _ = run(tmp_path, "signal_delay=180\nsupervise run targets 5 touch trained", LIMIT=limit)
    assert (tmp_path / "trained").exists() is trains
    assert code == (0 if trains else 1)
    assert events[0].split(":")[0] == ("finished" if trains else "failed")


def test_a_run_that_is_told_to_stop_at_every_start_is_given_up(tmp_path: Path) -> None:
    """Where the delay is not known here: every start saves a step, which counts as progress."""
    ranks = f"trap 'exit 143' USR1; touch {MET}; for _ in {{1..600}}; do sleep 0.05; done"
    for start in range(3):
        (tmp_path / "requeued").unlink(missing_ok=True)
        (tmp_path / MET).unlink(missing_ok=True)
        (tmp_path / f"run/checkpoints/step_{start}").mkdir(parents=True)
        body = signalled("USR1", ranks).replace("targets 5", "targets 2")
        _, events, requeued = run(tmp_path, body)
        assert requeued is (start < 2)
    assert "told to stop within 60 s of 3 starts in a row" in events[-1]


def test_ranks_that_do_not_follow_are_ended(tmp_path: Path) -> None:
    """A frozen rank would hold all nodes until srun's --wait is over."""
    (tmp_path / "srun.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGQUIT, lambda *_: os._exit(137))\n"
        f"pathlib.Path('{MET}').touch()\n"
        "pathlib.Path(os.environ['CYCLEVAE_FAILURES']).write_text('{\"exit_code\": 134}\\n')\n"
        "time.sleep(60)\n"
    )
    code, events, _ = run(tmp_path, f"linger=0.5\nsupervise run targets 5 {sys.executable} srun.py")
    assert code == 137
    assert events == ["requeued: exit code 137; restart 1 of at most 5 from checkpoint none"]


def test_a_setup_command_that_fails_ends_the_job(tmp_path: Path) -> None:
    assert run(tmp_path, "eval 'false' || setup_failed $? false\ntouch went_on")[0] == 1
    assert not (tmp_path / "went_on").exists()

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from ranks import start_ranks

from job.errors import ExitCode, UserError
from job.files import json_lines
from job.runtime import distributed
from job.runtime.watchdog import Watchdog


def hang_on_rank_1(failures: Path) -> None:
    os.environ["CYCLEVAE_FAILURES"] = str(failures)
    process = distributed.start("cpu", 60.0)
    with Watchdog(3.0) as watchdog:
        for step in range(100):
            watchdog.beat(step, "data")
            if process.rank == 1 and step == 5:
                the_loader_is_stuck()
            watchdog.beat(step, "train")
            distributed.agree_max(0)


def the_loader_is_stuck() -> None:
    time.sleep(1000)


def test_rank_that_hangs_is_named_by_all(tmp_path: Path) -> None:
    ranks = start_ranks(2, tmp_path, hang_on_rank_1, tmp_path / "failures.jsonl")
    assert [rank.exit_code(30) for rank in ranks] == [134, 134]
    assert "the_loader_is_stuck" in ranks[1].said  # its stack
    for rank in ranks:
        assert "rank 1 (" in rank.said
        assert "in step 5, data" in rank.said
    noted = {failure["rank"]: failure for failure in json_lines(tmp_path / "failures.jsonl")}
    assert {rank: failure["consequence"] for rank, failure in noted.items()} == {0: True, 1: False}
    assert noted[1]["message"].startswith("no progress for ")
    assert noted[1]["exit_code"] == 134


def gives_up_on_rank_1() -> None:
    process = distributed.start("cpu", 60.0)
    with Watchdog(60.0):
        if process.rank == 1:
            distributed.give_up("no room on the disk", ExitCode.FAILED)
            os._exit(ExitCode.FAILED)
        the_loader_is_stuck()


def test_a_rank_that_gave_up_is_not_waited_for(tmp_path: Path) -> None:
    """Its word is in the store: nobody has to come to a collective that fails."""
    ranks = start_ranks(3, tmp_path, gives_up_on_rank_1)
    assert [rank.exit_code(30) for rank in ranks] == [ExitCode.FAILED] * 3
    for rank in (ranks[0], ranks[2]):
        assert "lost another rank: rank 1 (" in rank.said
        assert "gave up: no room on the disk" in rank.said


def alone_and_stuck() -> None:
    with Watchdog(0.5) as watchdog:
        for _ in range(8):
            time.sleep(0.2)
            watchdog.beat(4, "evaluation")
        print("fed", flush=True)
        time.sleep(60)


def test_watchdog_of_a_single_process(tmp_path: Path) -> None:
    rank = start_ranks(1, tmp_path, alone_and_stuck)[0]
    assert rank.exit_code() == 134
    assert "fed" in rank.said
    assert "in step 4, evaluation (training.sick_rank_timeout_seconds=0.5)" in rank.said


def alone_and_paused() -> None:
    with Watchdog(2.0) as watchdog:
        watchdog.beat(4, "training")
        print("beat", flush=True)
        for _ in range(10):  # of which most are left when it goes on
            time.sleep(0.1)
    print("went on", flush=True)


def test_a_process_that_was_stopped_and_goes_on_is_not_ended(tmp_path: Path) -> None:
    """Ctrl-Z and fg: while it stood still there was nothing that could make progress."""
    rank = start_ranks(1, tmp_path, alone_and_paused)[0]
    rank.wait_for("beat", 30)
    rank.send(signal.SIGSTOP)
    time.sleep(4.0)
    rank.send(signal.SIGCONT)
    assert rank.exit_code() == 0
    assert "went on" in rank.said


def slow_where_it_may_be() -> None:
    with Watchdog(0.5) as watchdog:
        watchdog.beat(0, "training", patience=60.0)  # it compiles
        time.sleep(1.5)
        print("compiled", flush=True)
        watchdog.beat(1, "training")
        time.sleep(60)


def test_a_phase_may_be_given_more_patience(tmp_path: Path) -> None:
    rank = start_ranks(1, tmp_path, slow_where_it_may_be)[0]
    assert rank.exit_code() == 134
    assert "compiled" in rank.said
    assert "in step 1, training (training.sick_rank_timeout_seconds=0.5)" in rank.said


def one_run_after_another() -> None:
    for failure in (None, UserError("the first run of a sweep failed")):
        try:
            with Watchdog(0.5):
                if failure is not None:
                    raise failure
        except UserError:
            pass
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    time.sleep(1.5)
    print("still here", flush=True)


def test_a_watchdog_ends_with_the_run_it_watches(tmp_path: Path) -> None:
    """In a sweep without a cluster the process goes on with the next run."""
    rank = start_ranks(1, tmp_path, one_run_after_another)[0]
    assert rank.exit_code() == 0, rank.said
    assert "still here" in rank.said

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, start_ranks

from job.errors import JobError, UserError
from job.runtime import distributed
from job.runtime.place import Place, first_host, place
from job.runtime.watchdog import Watchdog

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_ID": "41234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_JOB_NODELIST": "gpu[01-12]",
}


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a[1,3]", "a1"),
        ("r[01-02]n[3-4]", "r01n3"),
        ("x-[10-11].site.org", "x-10.site.org"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_place_without_a_launcher() -> None:
    assert place({}) == Place(0, 0, 1)


def test_place_from_torchrun_comes_before_slurm() -> None:
    torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert place(SLURM | torchrun) == Place(3, 1, 4, "head", 1234)


def test_place_from_srun() -> None:
    assert place(SLURM) == Place(5, 1, 8, "gpu07", 10000 + 41234567 % 20000, "41234567.0")


def test_jobs_and_steps_that_share_a_node_have_different_ports() -> None:
    ports = {
        place(SLURM | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
        for job in range(500, 900)
        for step in range(4)
    }
    assert len(ports) == 1600
    assert min(ports) >= 10000
    assert max(ports) < 32768  # where Linux's own choices begin


def test_single_task_and_batch_script() -> None:
    assert place({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "1"}) == Place(0, 0, 1)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a[1-2]"}
    with pytest.raises(UserError, match="srun"):
        place(batch_script)
    assert place(batch_script, alone=True) == Place(0, 0, 1)
    assert place(SLURM, alone=True) == place(SLURM)


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU"):
        distributed._device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed._device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="local rank 2 has no GPU: 2 visible"):
        distributed._device("auto", 2)


def test_alone_nothing_waits() -> None:
    assert distributed.agree_max(3) == 3
    assert distributed.gather("x") == ["x"]
    distributed.barrier()
    distributed.shutdown()


def agreement() -> None:
    process = distributed.start("cpu", 20.0)
    assert distributed.agree_max(process.rank * 7) == 7
    assert distributed.gather({"rank": process.rank}) == [{"rank": 0}, {"rank": 1}]
    assert (process.is_main, process.world_size, process.device.type) == (process.rank == 0, 2, "cpu")
    distributed.shutdown()
    assert distributed.gather(1) == [1]


def test_two_ranks_agree(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, agreement)


def slurm_rank(rank: int) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(
        {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NTASKS": "2",
            "SLURM_JOB_ID": "77",
            "SLURM_STEP_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
        }
    )
    agreement()


def test_two_srun_tasks_agree(tmp_path: Path) -> None:
    ranks = [start_ranks(1, tmp_path / str(rank), slurm_rank, rank)[0] for rank in range(2)]
    assert [rank.exit_code() for rank in ranks] == [0, 0], ranks[0].said + ranks[1].said


def step_for_ever(timeout: float) -> None:
    distributed.start("cpu", timeout)
    for step in range(10**9):
        distributed.progress(step, "train")
        distributed.agree_max(0)
        if step == 3:
            print("running", flush=True)
        time.sleep(0.01)


def test_rank_that_dies_is_named_at_once(tmp_path: Path) -> None:
    ranks = start_ranks(2, tmp_path, step_for_ever, 60.0)
    for rank in ranks:
        rank.wait_for("running")
    ranks[1].send(signal.SIGKILL)
    assert ranks[0].exit_code(15) == 134, ranks[0].said  # well under the timeout of 60 seconds
    assert "rank 1 (" in ranks[0].said
    assert ") died or is frozen (last heard of in step " in ranks[0].said


def test_rank_that_freezes_is_named_within_the_timeout(tmp_path: Path) -> None:
    ranks = start_ranks(2, tmp_path, step_for_ever, 2.0)
    for rank in ranks:
        rank.wait_for("running")
    ranks[1].send(signal.SIGSTOP)
    try:
        assert ranks[0].exit_code(20) == 134
        assert "rank 1 (" in ranks[0].said
        assert "died or is frozen" in ranks[0].said
        assert "most recent call first" in ranks[0].said  # every thread's stack
    finally:
        ranks[1].send(signal.SIGKILL)


def bad_data(rank: int) -> None:
    process = distributed.start("cpu", 20.0)
    if process.rank == rank:
        try:
            raise UserError("shard 7 is corrupt")
        except JobError as error:
            distributed.give_up(str(error), error.exit_code)
            raise
    distributed.barrier()


@pytest.mark.parametrize("rank", [0, 1])  # rank 0 keeps the store here, as under srun
def test_cause_on_one_rank_becomes_the_exit_code_of_all(tmp_path: Path, rank: int) -> None:
    """Otherwise a scheduler retries bad data for ever because the other ranks lost a peer."""
    ranks = start_ranks(2, tmp_path, bad_data, rank)
    assert [rank.exit_code() for rank in ranks] == [1, 1]
    assert "gave up: shard 7 is corrupt" in ranks[1 - rank].said


def hang_on_rank_1() -> None:
    process = distributed.start("cpu", 60.0)
    watchdog = Watchdog(3.0).start()
    for step in range(100):
        watchdog.beat(step, "data")
        if process.rank == 1 and step == 5:
            the_loader_is_stuck()
        watchdog.beat(step, "train")
        distributed.agree_max(0)


def the_loader_is_stuck() -> None:
    time.sleep(1000)


def test_rank_that_hangs_is_named_by_all(tmp_path: Path) -> None:
    ranks = start_ranks(2, tmp_path, hang_on_rank_1)
    assert [rank.exit_code(30) for rank in ranks] == [134, 134]
    assert "the_loader_is_stuck" in ranks[1].said  # its stack
    for rank in ranks:
        assert "rank 1 (" in rank.said
        assert "in step 5, data" in rank.said


def alone_and_stuck() -> None:
    watchdog = Watchdog(0.5).start()
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

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, start_ranks

from job.errors import JobError, UserError
from job.runtime import distributed, heartbeat, store_watch


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
    wishes = [0]
    agreement = distributed.agree_meanwhile(lambda: wishes)
    wishes = [5]
    assert agreement() == [5]  # nobody to send to: asked at the end
    distributed.barrier()
    distributed.shutdown()


def agreement() -> None:
    process = distributed.start("cpu", 20.0)
    assert distributed.agree_max(process.rank * 7) == 7
    ahead, behind = process.rank, 1 - process.rank
    agreement = distributed.agree_meanwhile(lambda: [ahead, behind])
    ahead = 9  # too late for this one
    assert distributed.agree_max(process.rank + 3) == 4  # others may pass it
    assert agreement() == [1, 1]
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


def one_ends_as_it_starts(rank: int) -> None:
    """After it has joined, and before the others know where to reach it: as by SIGKILL."""
    store_watch.LOOK_SECONDS, store_watch.SILENT_SECONDS = 0.2, 3.0
    if os.environ["RANK"] == str(rank):
        distributed.dist.init_process_group = lambda *_, **__: os._exit(9)
    distributed.start("cpu", 60.0)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_rank_that_ends_while_the_others_wait_for_all_is_noticed(tmp_path: Path, rank: int) -> None:
    """Nothing else would tell them before the whole time for a start is over."""
    ranks = start_ranks(3, tmp_path, one_ends_as_it_starts, rank)
    ends = [one.exit_code(30) for one in ranks]
    assert ends.pop(rank) == 9
    assert ends == [134, 134], "\n".join(one.said for one in ranks)
    if rank > 0:
        assert f"rank {rank} (" in ranks[0].said
        assert "had joined the run and has given no sign of life for 3 s" in ranks[0].said


def step_for_ever(timeout: float) -> None:
    heartbeat.ANSWER_SECONDS = 4.0
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


@pytest.mark.parametrize(
    ("frozen", "words"),
    [
        (1, "died or is frozen"),
        (0, "the node of rank 0, which keeps the rendezvous store, does not answer (no answer in 4 s)"),
    ],
)
def test_rank_that_freezes_is_named_within_the_timeout(tmp_path: Path, frozen: int, words: str) -> None:
    ranks = start_ranks(2, tmp_path, step_for_ever, 2.0)
    for rank in ranks:
        rank.wait_for("running")
    ranks[frozen].send(signal.SIGSTOP)
    other = ranks[1 - frozen]
    try:
        assert other.exit_code(30) == 134
        assert f"rank {frozen}" in other.said
        assert words in other.said
        assert "most recent call first" in other.said  # every thread's stack
    finally:
        ranks[frozen].send(signal.SIGKILL)


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

"""Checkpoints of several real ranks, and of ranks that are killed, fill the disk or may not write."""

from __future__ import annotations

import os
import pathlib
import resource
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, start_ranks

from job.errors import RetryError
from job.runtime import checkpointer, distributed
from job.runtime.checkpoint import Checkpoint, open_checkpoint, read_weights
from job.runtime.checkpointer import Checkpointer
from job.runtime.distributed import Process
from job.runtime.stop import StopSignals

ALONE = Process(0, 0, 1, torch.device("cpu"), "here")


def state(step: int, size: int = 5000) -> dict[str, Any]:
    return {
        "model": {f"layer{i}": torch.full((size,), float(100 * step + i)) for i in range(6)},
        "step": torch.tensor(step),
    }


def whole(found: Checkpoint) -> bool:
    """Whether all tensors are of the step in the name."""
    return all(
        tensor.equal(dict(state(found.step)["model"] | {"step": torch.tensor(found.step)})[name.split(".")[-1]])
        for name, tensor in read_weights(found).items()
    )


def join(directory: Path, keep_last: int = 2) -> Checkpointer:
    return Checkpointer(directory, distributed.start("cpu", 20.0), keep_last=keep_last, keep_every=0)


# Another number of ranks


def save_one(directory: Path) -> None:
    c = join(directory)
    c.save(4, state(4), {"samples": 64})
    assert c.wait()
    distributed.shutdown()


def load_one(directory: Path) -> None:
    c = join(directory)
    found = c.newest_valid()
    assert found is not None
    back = state(0)
    assert c.load(found, back) == {"samples": 64}
    assert all(back["model"][name].equal(t) for name, t in state(4)["model"].items())
    distributed.shutdown()


def test_written_by_two_ranks_and_read_by_one_and_three(tmp_path: Path) -> None:
    run_ranks(2, tmp_path / "out", save_one, tmp_path / "c")
    sizes = [file.stat().st_size for file in (tmp_path / "c" / "step_00000004").glob("share*")]
    assert len(sizes) == 2
    assert max(sizes) < 1.1 * min(sizes)  # every rank its share
    run_ranks(1, tmp_path / "out", load_one, tmp_path / "c")
    run_ranks(3, tmp_path / "out", load_one, tmp_path / "c")


# Shards


def shards(directory: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    process = distributed.start("cpu", 20.0)
    mesh = init_device_mesh("cpu", (process.world_size,))
    full = torch.arange(35.0).view(7, 5)
    tensors = {
        "uneven": distribute_tensor(full, mesh, [Shard(0)]),
        "copies": distribute_tensor(full + 1, mesh, [Replicate()]),
        "plain": full + 2,
    }
    c = Checkpointer(directory, process, keep_last=1, keep_every=0)
    c.save(1, tensors, {}, blocking=True)
    assert c.wait()
    found = c.newest_valid()
    assert found is not None
    zero = torch.zeros(7, 5)
    other = {
        "uneven": distribute_tensor(zero, mesh, [Shard(1)]),
        "copies": zero.clone(),
        "plain": distribute_tensor(zero, mesh, [Shard(0)]),
    }
    c.load(found, other)
    for i, (name, tensor) in enumerate(other.items()):
        whole_tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert whole_tensor.equal(full + i), name
    distributed.shutdown()


def test_shards_are_read_back_in_another_layout(tmp_path: Path) -> None:
    run_ranks(3, tmp_path / "out", shards, tmp_path / "c")
    assert read_weights(open_checkpoint(tmp_path / "c"))["uneven"].equal(torch.arange(35.0).view(7, 5))


# Disks


def disk_full_on_rank_1(directory: Path) -> None:
    c = join(directory)
    log: list[str] = []
    c._log = log.append
    c.save(1, state(1), {}, blocking=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if c.process.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    c.save(2, state(2), {}, blocking=True)
    assert not c.wait()
    assert (c.stats.saves, c.stats.failures) == (1, 1)
    distributed.barrier()
    assert sorted(path.name for path in directory.glob("step*")) == ["step_00000001"]
    assert c.process.rank != 0 or ("step 2 failed" in log[0] and "rank 1: [Errno 27] File too large" in log[0])
    distributed.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    c.save(3, state(3), {}, blocking=True)
    assert c.wait()
    assert (c.stats.saves, c.stats.failures) == (2, 1)
    found = c.newest_valid()
    assert found is not None
    assert found.step == 3
    distributed.shutdown()


def test_disk_full_on_one_rank_fails_the_save_on_all_and_the_run_goes_on(tmp_path: Path) -> None:
    run_ranks(2, tmp_path / "out", disk_full_on_rank_1, tmp_path / "c")
    assert whole(open_checkpoint(tmp_path / "c"))


def read_only(directory: Path) -> None:
    if os.geteuid() == 0:  # root may write anywhere
        os.seteuid(65534)
    c = join(directory)
    c.save(1, state(1), {}, blocking=True)
    assert c.wait()
    directory.chmod(0o555)
    c.save(2, state(2), {}, blocking=True)
    assert not c.wait()
    assert open_checkpoint(directory).step == 1
    directory.chmod(0o755)
    c.save(3, state(3), {}, blocking=True)
    assert c.wait()


def test_read_only_directory(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as parent:  # pytest's own directories are closed to other users
        os.chmod(parent, 0o755)
        directory = Path(parent) / "checkpoints"
        directory.mkdir()
        if os.geteuid() == 0:
            os.chown(directory, 65534, -1)
        said = run_ranks(1, tmp_path / "out", read_only, directory)
    assert "warning: checkpoint at step 2 failed" in said[0]
    assert "Permission denied" in said[0]


# Two runs in one directory


def hold(directory: Path, seconds: float) -> None:
    c = join(directory)
    print("locked", flush=True)
    time.sleep(seconds)
    assert c is not None


def second_run(directory: Path) -> None:
    checkpointer.LOCK_SECONDS = 2
    join(directory)


def test_a_second_run_in_the_same_directory_waits_for_the_first_and_then_gives_up(tmp_path: Path) -> None:
    first = start_ranks(1, tmp_path / "first", hold, tmp_path / "c", 60.0)[0]
    first.wait_for("locked")
    second = start_ranks(2, tmp_path / "second", second_run, tmp_path / "c")
    assert [rank.exit_code() for rank in second] == [134, 134]
    assert f"is in use by process {first.process.pid} on " in second[1].said
    assert "which has not ended for 2 s" in second[1].said
    assert f"is in use by process {first.process.pid} on " in second[0].said.splitlines()[0]
    assert "waiting up to 2 s for it to end" in second[0].said.splitlines()[0]
    third = start_ranks(1, tmp_path / "third", second_run, tmp_path / "c")[0]
    first.send(signal.SIGKILL)  # as dead as a run can be: its lock goes with it
    assert third.exit_code() == 0, third.said


def waiting_run(directory: Path) -> None:
    signals = StopSignals().install()
    Checkpointer(
        directory, ALONE, keep_last=2, keep_every=0, log=partial(print, flush=True), stop=lambda: signals.requested
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_waiting_for_another_run_at_once(tmp_path: Path, number: signal.Signals) -> None:
    first = start_ranks(1, tmp_path / "first", hold, tmp_path / "c", 120.0)[0]
    first.wait_for("locked")
    second = start_ranks(1, tmp_path / "second", waiting_run, tmp_path / "c")[0]
    second.wait_for("waiting up to 60 s", seconds=20)
    second.send(number)
    assert second.exit_code(10) == 143, second.said
    assert f"stopped ({number.name}) while waiting" in second.said
    first.send(signal.SIGKILL)
    first.exit_code()


# Kills


def kill_at(directory: Path, first: int, point: int) -> None:
    """Save three steps and die just before the point-th call that makes something lasting."""
    calls = 0

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    c = Checkpointer(directory, ALONE, keep_last=1, keep_every=0)
    c.newest_valid()
    for owner, name in (
        (os, "fsync"),
        (pathlib.Path, "rename"),
        (os, "rmdir"),
        (os, "unlink"),
        (pathlib.Path, "mkdir"),
        (pathlib.Path, "open"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
    for step in (first, first + 1, first + 2):
        c.save(step, state(step), {}, blocking=True)


def test_killed_between_any_two_operations_of_a_save(tmp_path: Path) -> None:
    """At every point the newest checkpoint is whole and no older than the last one committed; no rubbish is left."""
    newest, point, waves = 0, 1, 4
    directory = tmp_path / "c"
    while True:
        ranks = start_ranks(1, tmp_path / "out", kill_at, directory, newest + 1, point)
        code = ranks[0].exit_code()
        log: list[str] = []
        found = Checkpointer(directory, ALONE, keep_last=1, keep_every=0, log=log.append).newest_valid()
        assert log == [], f"killed at {point}"
        assert found is not None or newest == 0
        if found is not None:
            assert whole(found)
            assert found.step >= newest
            newest = found.step
        assert not list(directory.glob("*.tmp"))
        for path in directory.glob("step_*"):
            assert whole(open_checkpoint(path)), f"killed at {point}"
        if code == 0:
            break
        assert code == -signal.SIGKILL, ranks[0].said
        point += 1
    assert point > 3 * waves


def save_for_ever(directory: Path) -> None:
    c = join(directory)
    found = c.newest_valid()
    step = found.step if found else 0
    print("ready", flush=True)
    while True:
        step += 1
        c.save(step, state(step), {})
        if step % 3 == 0:
            c.wait()


def test_killed_at_random_moments_on_two_ranks(tmp_path: Path) -> None:
    newest = 0
    for attempt in range(3):
        ranks = start_ranks(2, tmp_path / "out", save_for_ever, tmp_path / "c")
        for rank in ranks:
            rank.wait_for("ready")
        time.sleep(0.3 + 0.11 * attempt)
        for rank in ranks:
            rank.send(signal.SIGKILL)
        for rank in ranks:
            rank.exit_code()
        found = open_checkpoint(tmp_path / "c")
        assert whole(found)
        assert found.step > newest
        newest = found.step


def rank_1_dies_in_a_save(directory: Path) -> None:
    c = join(directory)
    c.save(1, state(1), {}, blocking=True)
    distributed.barrier()
    if c.process.rank == 1:
        c._write_share = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
    c.save(2, state(2), {})
    assert not c.wait()
    assert c.stats.failures == 1
    try:
        distributed.barrier()
    except RetryError as error:
        print(error)
        raise


def test_rank_that_dies_in_a_save_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    ranks = start_ranks(2, tmp_path / "out", rank_1_dies_in_a_save, tmp_path / "c")
    assert [rank.exit_code() for rank in ranks] == [134, -signal.SIGKILL]
    assert "rank 1" in ranks[0].said
    assert open_checkpoint(tmp_path / "c").step == 1

"""The processes of a run: how they join, agree, and notice that one of them is lost.

Collectives of the training step go over the default process group (NCCL on GPUs, gloo on CPUs). Decisions of the loop
go over a gloo group of their own, `control`: they concern numbers on the host, and over NCCL each would queue behind
the step's kernels and make the host wait for the GPU. Checkpoints have a third, `saves`, because a save runs in a
thread beside the loop: two threads on one group would mix up whose turn it is. It also has a longer timeout, since one
rank may write an hour longer than another while training goes on.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from job.errors import ExitCode, LostRankError, UserError, first_line
from job.runtime.heartbeat import Heartbeats, answered_within
from job.runtime.launcher_variables import (
    Placement,
    placement,
    scheduler_job_id,
    share_address,
    started_by_torchrun,
    store_mark,
)
from job.runtime.meeting_point import find_meeting_point
from job.runtime.same_store import refuse_another
from job.runtime.store_watch import ended_with

# Ranks may come up minutes apart (image pulls, cold caches), however short the timeout of a running job is.
START_SECONDS = 300.0
# How long one rank may write longer than another; a rank that died meanwhile closes its connection.
SAVE_SECONDS = 3600.0
# Rank 0 may keep the store (under srun it does) in which the others look up whom they lost: it leaves last.
LINGER_SECONDS = 4.0
# Telling the others why this rank ends must not keep it from ending: the store's host may be gone.
GIVE_UP_SECONDS = 10.0


@dataclass(frozen=True)
class Process:
    """One process of the run and the device it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    node: str
    job_id: str = "local"  # the scheduler's, for people who look for it there

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes logs and metrics."""
        return self.rank == 0


@dataclass(frozen=True)
class Connections:
    """What ties this process to the other ranks, beside the default process group."""

    control: dist.ProcessGroup
    saves: dist.ProcessGroup
    heartbeats: Heartbeats


@dataclass(frozen=True)
class Loss:
    """Why the ranks cannot go on together."""

    reason: str  # one line that names the rank
    exit_code: ExitCode  # what every rank ends with
    is_here: bool = False  # this rank itself is the one that hangs


# Of the process, like torch's default group: None until `start`, after `shutdown`, and in a run of one process.
_connections: Connections | None = None


# Joining and leaving


def start(device: Literal["auto", "cpu", "cuda"], timeout_seconds: float) -> Process:
    """Join the run: process groups and signs of life. The only process of a run joins nothing.

    timeout_seconds bounds every later wait for another rank. Raises UserError for too few GPUs or a MASTER_ADDR that
    is no host, RetryError when the port is taken, LostRankError when the other ranks do not come.
    """
    global _connections
    here = placement(os.environ)
    if started_by_torchrun(os.environ):
        _stop_with_parent()
    process = Process(
        rank=here.rank,
        local_rank=here.local_rank,
        world_size=here.world_size,
        device=_device(device, here.local_rank),
        node=socket.gethostname(),
        job_id=scheduler_job_id(os.environ),
    )
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    if here.address is not None:
        try:
            _connections = _connect(process, here, timeout_seconds)
        except RuntimeError as error:
            raise LostRankError(
                f"rank {here.rank} of {here.world_size} could not join the run "
                f"at {here.address}:{here.port}: {_first_line(error)}"
            ) from error
    return process


def _connect(process: Process, here: Placement, timeout_seconds: float) -> Connections:
    """Meet the other ranks. Raises RuntimeError when they do not come."""
    share_address(here)
    if here.by_srun:
        find_meeting_point(here, process.node)
    on_cpu = process.device.type == "cpu"
    waiting = timedelta(seconds=max(START_SECONDS, timeout_seconds))
    meeting, _, _ = next(iter(rendezvous("env://", here.rank, here.world_size, timeout=waiting)))
    refuse_another(meeting, store_mark(os.environ))
    store = dist.PrefixStore(f"job/{here.run_id}", meeting)
    # NCCL has a watchdog of its own, which aborts the process without saying which rank is missing. Ours names the
    # rank, so NCCL's is given twice the time: it acts only where ours could not, such as in a stuck driver call.
    patience = timeout_seconds if on_cpu else 2 * timeout_seconds
    # Before anything that waits for all: of a rank that ends meanwhile nothing else tells. Rank 0 looks after all, and
    # the others after it alone: as it ends, they end too, and hundreds that asked for hundreds of signs would be slow.
    heartbeats = Heartbeats(dist.PrefixStore("signs", store), here.rank, here.world_size, process.node)
    watched = range(here.world_size) if here.rank == 0 else [0]
    with ended_with(lambda: heartbeats.signs(watched), within=waiting.total_seconds()):
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            store=store,
            rank=here.rank,
            world_size=here.world_size,
            timeout=timedelta(seconds=patience),
            device_id=None if on_cpu else process.device,
        )
        return Connections(
            control=dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds)),
            saves=dist.new_group(backend="gloo", timeout=timedelta(seconds=max(SAVE_SECONDS, timeout_seconds))),
            heartbeats=heartbeats,
        )


def _device(device: str, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "training.device=cuda, but PyTorch sees no GPU here; check the driver and CUDA_VISIBLE_DEVICES, "
            "or set training.device=cpu"
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible on {socket.gethostname()}; "
            "start one process per GPU, with all GPUs of the node visible to each (for instance srun --gpus-per-node, "
            "not --gpus-per-task)"
        )
    return torch.device("cuda", local_rank)


def _stop_with_parent() -> None:
    """Let the kernel send SIGTERM when torchrun dies: a worker left behind would go on writing to the run directory."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def shutdown() -> None:
    """Leave the run in good order, all ranks together."""
    global _connections
    if _connections is None:
        return
    barrier()
    _connections.heartbeats.stop()
    _connections = None
    dist.destroy_process_group()


def leave(exit_code: int) -> NoReturn:
    """End at once with `exit_code`: after a failure, destructors of process groups would wait for the lost ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _connections is not None and _connections.heartbeats.sign.rank == 0:
        time.sleep(LINGER_SECONDS)
    os._exit(exit_code)


# Agreeing


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return _connections is not None


def agree_max(value: int) -> int:
    """Largest `value` of all ranks; one small all-reduce on the host. Raises LostRankError naming a missing rank."""
    return agree_meanwhile(lambda: [value])()[0]


def agree_meanwhile(wishes: Callable[[], list[int]]) -> Callable[[], list[int]]:
    """Send this rank's wishes to all; called later, the result gives the largest of each of them, alike on every rank.

    Agreement takes a ring of hundreds of ranks tens of milliseconds, in which the caller goes on with the step. The
    only process of a run is asked for its wishes when the result is called, and so a step earlier. The result must be
    called once, and raises LostRankError naming a missing rank.
    """
    if _connections is None:
        return wishes
    with peers_needed():
        agreed = torch.tensor(wishes(), dtype=torch.int64)
        work = dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=_connections.control, async_op=True)

    def result() -> list[int]:
        with peers_needed():
            work.wait()
        return agreed.tolist()

    return result


def gather(value: Any, group: Literal["control", "saves"] = "control") -> list[Any]:
    """Every rank's (picklable) value, by rank. A group must not be used by two threads at once.

    Raises LostRankError over `control`. Over `saves` it raises RuntimeError: that is the thread of a save, which only
    fails the save; the loop notices the loss by itself.
    """
    if _connections is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    if group == "saves":
        dist.all_gather_object(values, value, group=_connections.saves)
    else:
        with peers_needed():
            dist.all_gather_object(values, value, group=_connections.control)
    return values


def barrier() -> None:
    """Wait for all ranks, no longer than the timeout. Raises LostRankError naming a missing rank."""
    agree_max(0)


# Noticing losses


def progress(step: int, phase: str) -> None:
    """Note in this rank's sign of life where the main loop is (the watchdog does it)."""
    if _connections is not None:
        _connections.heartbeats.progress(step, phase)


def give_up(failure: str, exit_code: int) -> None:
    """Leave word of why this rank ends: the others then end with the same message and exit code. Best effort."""
    if _connections is None:
        return
    heartbeats = _connections.heartbeats
    try:
        answered_within(GIVE_UP_SECONDS, lambda: heartbeats.give_up(failure, exit_code))
    except RuntimeError as error:
        print(f"could not tell the other ranks: {_first_line(error)}", file=sys.stderr, flush=True)


def another_gave_up() -> bool:
    """Whether another rank has left word of why it ends."""
    if _connections is None:
        return False
    failure = _connections.heartbeats.failure
    return failure is not None and failure.rank != _connections.heartbeats.sign.rank


def missing(or_slowest: bool = False) -> Loss | None:
    """The ranks that gave up, died or froze; None when every rank still gives signs of life. Takes about two seconds.

    With `or_slowest` it is then the rank that is furthest behind. None in a run of one process.
    """
    if _connections is None:
        return None
    heartbeats = _connections.heartbeats
    others, store_lost = [], ""
    try:
        others = heartbeats.others()
    except RuntimeError as error:
        store_lost = f"the node of rank 0, which keeps the rendezvous store, does not answer ({_first_line(error)})"
    # A rank that could say why it ends is the cause, and those that no longer give signs may have ended because of it.
    gave_up = heartbeats.failure
    if gave_up is not None:
        code = ExitCode.FAILED if gave_up.exit_code == ExitCode.FAILED else ExitCode.RETRY
        return Loss(f"{gave_up} gave up: {gave_up.failure}", code)
    if store_lost:
        return Loss(store_lost, ExitCode.RETRY)
    silent = [
        f"{sign} died or is frozen (last heard of in step {sign.step}, {sign.phase})"
        for sign, renewed in others
        if not renewed
    ]
    if silent:
        return Loss("; ".join(silent), ExitCode.RETRY)
    if not or_slowest:
        return None
    # All ranks go through the same steps and phases. When one hangs, the others come to wait for it a phase or more
    # later, so it is the one with the fewest changes of phase; of equals, the one that has stood there longest.
    own = heartbeats.sign
    slowest = min([sign for sign, _ in others] + [own], key=lambda sign: (sign.changes, -sign.age))
    where = f"for {slowest.age:.0f} s in step {slowest.step}, {slowest.phase}"
    return Loss(f"{slowest} is furthest behind: {where}", ExitCode.RETRY, is_here=slowest is own)


@contextmanager
def peers_needed() -> Iterator[None]:
    """Around whatever waits for other ranks: the loss of one becomes LostRankError naming it.

    After a timeout every thread's stack is printed first. Errors that are not about other ranks pass through.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_about_peers(error):
            raise
        # "Connection closed by peer" says all. After a timeout the question is what everyone was doing.
        if "by peer" not in str(error):
            faulthandler.dump_traceback(all_threads=True)
        loss = missing(or_slowest=True) or Loss("no connection to the other ranks", ExitCode.RETRY)
        raise LostRankError(f"lost another rank: {loss.reason} [{_first_line(error)}]", loss.exit_code) from error


def _is_about_peers(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank. gloo raises plain RuntimeErrors, told by their text."""
    gloo = re.search(r"gloo|Application timeout caused pair closure", str(error))
    return isinstance(error, dist.DistError) or gloo is not None


def _first_line(error: BaseException) -> str:
    return first_line(error).split(". This is typically")[0]

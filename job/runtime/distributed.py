"""The processes of a run: how they find each other, agree, and notice that one of them is missing."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from job.errors import ExitCode, JobError, RetryError, UserError
from job.runtime.heartbeat import Heartbeats
from job.runtime.place import place

START_SECONDS = (
    300.0  # ranks may come up minutes apart (image pulls, cold caches), however short the timeout of a running job is
)
LINGER_SECONDS = 4.0  # rank 0 may keep the store (under srun it does) in which the others look up whom they lost
SAVE_SECONDS = (
    3600.0  # how long one rank may write longer than another; a rank that died meanwhile closes its connection
)


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


_groups: dict[str, dist.ProcessGroup] = {}
_heartbeats: Heartbeats | None = None


def _device(device: str, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "training.device=cuda, but PyTorch sees no GPU here; check the driver and CUDA_VISIBLE_DEVICES, or set training.device=cpu"
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible on {socket.gethostname()}; start one process per GPU, "
            "with all GPUs of the node visible to each (for instance srun --gpus-per-node, not --gpus-per-task)"
        )
    return torch.device("cuda", local_rank)


def _stop_with_parent() -> None:
    """Let the kernel send SIGTERM when torchrun dies: a worker left behind would go on writing into the run's directory."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def start(device: Literal["auto", "cpu", "cuda"], timeout_seconds: float) -> Process:
    """Join the run: process group (NCCL on GPUs, gloo on CPUs), groups for decisions on the host, signs of life.

    timeout_seconds bounds every later wait for another rank. Raises UserError for too few GPUs, RetryError when
    the other ranks do not come.
    """
    global _heartbeats
    here = place(os.environ)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _stop_with_parent()
    process = Process(
        here.rank,
        here.local_rank,
        here.world_size,
        _device(device, here.local_rank),
        socket.gethostname(),
        os.environ.get("SLURM_JOB_ID", "local"),
    )
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    if here.address is None:
        return process
    os.environ.update(MASTER_ADDR=here.address, MASTER_PORT=str(here.port))
    waiting = timedelta(seconds=max(START_SECONDS, timeout_seconds))
    # NCCL's own watchdog aborts without naming anyone: it comes second, if ours could not act.
    patience = timedelta(seconds=timeout_seconds if process.device.type == "cpu" else 2 * timeout_seconds)
    try:
        store, _, _ = next(iter(rendezvous("env://", here.rank, here.world_size, timeout=waiting)))
        store = dist.PrefixStore(f"job/{here.run_id}", store)
        dist.init_process_group(
            "gloo" if process.device.type == "cpu" else "nccl",
            store=store,
            rank=here.rank,
            world_size=here.world_size,
            timeout=patience,
            device_id=process.device if process.device.type == "cuda" else None,
        )
        _groups["control"] = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        _groups["saves"] = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(SAVE_SECONDS, timeout_seconds)))
        _heartbeats = Heartbeats(dist.PrefixStore("signs", store), here.rank, here.world_size, process.node)
    except RuntimeError as error:
        raise RetryError(
            f"rank {here.rank} of {here.world_size} could not join the run at {here.address}:{here.port}: {_first_line(error)}"
        ) from error
    return process


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return bool(_groups)


def agree_max(value: int) -> int:
    """Largest `value` of all ranks; one small all-reduce on the host. Raises RetryError naming a missing rank."""
    if not _groups:
        return value
    with peers_needed():
        tensor = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_groups["control"])
        return int(tensor)


def gather(value: Any, group: Literal["control", "saves"] = "control") -> list[Any]:
    """Every rank's (picklable) value, by rank. A group must not be used by two threads at once."""
    if not _groups:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist_group = _groups[group]
    if group == "control":
        with peers_needed():
            dist.all_gather_object(values, value, group=dist_group)
    else:
        dist.all_gather_object(values, value, group=dist_group)
    return values


def barrier() -> None:
    """Wait for all ranks, no longer than the timeout. Raises RetryError naming a missing rank."""
    agree_max(0)


def progress(step: int, phase: str) -> None:
    """Note in this rank's sign of life where the main loop is (the watchdog does it)."""
    if _heartbeats is not None:
        _heartbeats.progress(step, phase)


def give_up(failure: str, exit_code: int) -> None:
    """Leave word of why this rank ends: the others then end with the same message and exit code. Best effort."""
    if _heartbeats is not None:
        try:
            _heartbeats.give_up(failure, exit_code)
        except RuntimeError as error:
            print(f"could not tell the other ranks: {_first_line(error)}", file=sys.stderr, flush=True)


def missing(or_slowest: bool = False) -> tuple[str | None, ExitCode]:
    """One line on the ranks that gave up, or died or froze, and the exit code they leave behind; takes about two seconds.

    Without such a rank None, or, if wished, the one that is furthest behind.
    """
    if _heartbeats is None:
        return None, ExitCode.RETRY
    others, lost = [], ""
    try:
        others = _heartbeats.others()
    except RuntimeError as error:
        lost = f"the node of rank 0, which keeps the rendezvous store, does not answer ({_first_line(error)})"
    if _heartbeats.failure is not None:
        return f"{_heartbeats.failure} gave up: {_heartbeats.failure.failure}", ExitCode(_heartbeats.failure.exit_code)
    if lost:
        return lost, ExitCode.RETRY
    silent = [
        f"{sign} died or is frozen (last heard of in step {sign.step}, {sign.phase})"
        for sign, renewed in others
        if not renewed
    ]
    if silent or not or_slowest:
        return "; ".join(silent) or None, ExitCode.RETRY
    slow = min([sign for sign, _ in others] + [_heartbeats.sign], key=lambda sign: (sign.changes, -sign.age))
    return f"{slow} is furthest behind: for {slow.age:.0f} s in step {slow.step}, {slow.phase}", ExitCode.RETRY


@contextmanager
def peers_needed() -> Iterator[None]:
    """Around whatever waits for other ranks: the loss of one becomes RetryError naming it; after a timeout every thread's stack comes first."""
    try:
        yield
    except RuntimeError as error:
        if not (
            isinstance(error, dist.DistError) or re.search(r"gloo|Application timeout caused pair closure", str(error))
        ):
            raise
        if "by peer" not in str(
            error
        ):  # a closed connection says all; after a timeout the question is what everyone was doing
            faulthandler.dump_traceback(all_threads=True)
        reason, code = missing(or_slowest=True)
        failure = JobError if code == ExitCode.FAILED else RetryError
        raise failure(f"lost another rank: {reason} [{_first_line(error)}]") from error


def shutdown() -> None:
    """Leave the run in good order, all ranks together."""
    global _heartbeats
    if not _groups:
        return
    barrier()
    if _heartbeats is not None:
        _heartbeats.stop()
        _heartbeats = None
    _groups.clear()
    dist.destroy_process_group()


def leave(exit_code: int) -> NoReturn:
    """End at once with `exit_code`: after a failure, destructors of process groups would wait for the lost ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _heartbeats is not None and _heartbeats.sign.rank == 0:
        time.sleep(LINGER_SECONDS)
    os._exit(exit_code)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". This is typically")[0] or type(error).__name__

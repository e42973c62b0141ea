"""What a run needs of its machine besides GPUs: shared memory, a disk, a clock, limits, locks."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from job.checks import Check, note, trouble, well

GIB, MB = 2**30, 10**6
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = 256 << 20  # loader processes and NCCL pass buffers through it; containers begin with 64 MB
WRITTEN = 64 << 20  # bytes written to learn how fast the disk is
SLOW_DISK = 20 * MB  # bytes a second: a checkpoint of 40 M parameters would take half a minute
LITTLE_ROOM = GIB
LEAST_FILES = 1024
LARGEST_SKEW = 5.0  # seconds between the clocks of this machine and of the file system
UNSYNCHRONIZED = 5  # TIME_ERROR of adjtimex(2)


def system_checks(directory: Path, needed: int = 0) -> list[Check]:
    """The checks of the machine, and of the disk of the nearest directory that is there, which must hold `needed`."""
    place = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    usage = os.statvfs(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    checks = [shared_memory_check(usage.f_frsize * usage.f_blocks if usage else None)]
    checks += disk_checks(place, needed)
    checks += [limits_check(read_limits())]
    return checks


def shared_memory_check(size: int | None) -> Check:
    """/dev/shm of so many bytes; None: there is none."""
    name = "shared memory"
    remedy = "start the container with --shm-size=8g, the pod with an emptyDir of medium Memory at /dev/shm"
    if size is None:
        return trouble(name, f"{SHARED_MEMORY} is missing: loader processes cannot hand over batches", remedy)
    if size < LEAST_SHARED:
        words = f"{SHARED_MEMORY} has {size / MB:.0f} MB: loader processes (data.num_workers) and NCCL may die of it"
        return trouble(name, words, remedy)
    return well(name, f"{SHARED_MEMORY} has {size / GIB:.1f} GiB")


def disk_checks(place: Path, needed: int) -> list[Check]:
    """Room, speed, clock and locks of the disk on which `place` lies."""
    checks = [room_check(place, shutil.disk_usage(place).free, needed)]
    try:
        rate, skew = measured_write(place)
    except OSError as error:
        remedy = "give the directory to the user that trains, or choose another logging.save_dir"
        return [*checks, trouble("disk", f"{place}: cannot be written ({error.strerror})", remedy)]
    checks.append(speed_check(place, rate))
    checks.append(clock_check(skew, clock_is_synchronized()))
    return [*checks, lock_check(place, locks_hold(place))]


def room_check(place: Path, free: int, needed: int) -> Check:
    """Whether checkpoints of `needed` bytes have room."""
    name, words = "room", f"{free / GIB:.1f} GiB free at {place}"
    if needed:
        words += f", {needed / GIB:.2f} GiB needed for the checkpoints that are kept and the one being written"
    if free < max(needed, 0 if needed else LITTLE_ROOM):
        return trouble(name, words, "free space, lower logging.keep_last, or choose another logging.save_dir")
    return well(name, words)


def measured_write(place: Path) -> tuple[float, float]:
    """Bytes a second of a write with its fsync, and seconds by which the file system's clock is ahead. OSError."""
    block = os.urandom(1 << 20)  # a file system that compresses would be too fast with zeros
    with tempfile.NamedTemporaryFile(dir=place, prefix=".cyclevae-doctor-") as file:
        started = time.perf_counter()
        for _ in range(WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        file.write(b".")
        file.flush()
        os.fsync(file.fileno())
        skew = os.stat(file.name).st_mtime - time.time()
    return WRITTEN / seconds, skew


def speed_check(place: Path, rate: float) -> Check:
    """Whether the disk keeps up with checkpoints."""
    words = f"{place} takes {rate / MB:.0f} MB/s"
    if rate < SLOW_DISK:
        return trouble("disk speed", words, "save less often (logging.save_freq), or choose a faster logging.save_dir")
    return well("disk speed", words)


def clock_is_synchronized() -> bool | None:
    """What the kernel says of its clock; None where it does not say."""
    try:
        buffer = ctypes.create_string_buffer(512)  # struct timex, of which nothing is set or read
        state = ctypes.CDLL(None).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != UNSYNCHRONIZED


def clock_check(skew: float, synchronized: bool | None) -> Check:
    """Whether times that machines write down can be compared."""
    if abs(skew) > LARGEST_SKEW:
        words = f"the file system's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
        return trouble(
            "clock", words + ": signs of life and Prometheus' stamps are misread", "run chrony or ntpd on both"
        )
    if synchronized is False:
        return note("clock", "the kernel says that nothing synchronizes it", "run chrony or ntpd")
    return well("clock", f"within {max(0.1, abs(skew)):.1f} s of the file system's")


@dataclass(frozen=True)
class Limits:
    """Soft limits of this process; -1: none."""

    files: int
    processes: int
    locked_memory: int
    infiniband: bool


def read_limits() -> Limits:
    """The limits of this process, and whether there is an InfiniBand adapter."""
    soft = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in ("NOFILE", "NPROC", "MEMLOCK")}
    return Limits(soft["NOFILE"], soft["NPROC"], soft["MEMLOCK"], Path("/sys/class/infiniband").is_dir())


def limits_check(limits: Limits) -> Check:
    """Whether the limits leave room for a run."""
    if 0 <= limits.files < LEAST_FILES:
        return trouble(
            "limits", f"{limits.files} open files at most: loaders and many shards need more", "ulimit -n 65536"
        )
    if 0 <= limits.processes < 256:
        return trouble("limits", f"{limits.processes} processes at most, threads included", "ulimit -u 8192")
    if limits.infiniband and limits.locked_memory >= 0:
        words = f"{limits.locked_memory / MB:.0f} MB of locked memory at most: NCCL cannot use InfiniBand"
        return trouble("limits", words, "ulimit -l unlimited, for SLURM PropagateResourceLimitsExcept=MEMLOCK")
    return well("limits", f"{'any number of' if limits.files < 0 else limits.files} open files")


def locks_hold(place: Path) -> bool | None:
    """Whether a lock of this process keeps another from taking it; None: the file system knows no locks."""
    other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with tempfile.NamedTemporaryFile(dir=place, prefix=".cyclevae-doctor-", mode="a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        return subprocess.run([sys.executable, "-S", "-c", other, file.name], capture_output=True).returncode != 0


def lock_check(place: Path, holds: bool | None) -> Check:
    """Whether two starts of one run can be kept apart."""
    remedy = "mount the file system with locks (NFS: without nolock; Lustre: with flock), or never start a run twice"
    if holds is None:
        return trouble(
            "file locks", f"{place}: files cannot be locked, so a second start of a run is not noticed", remedy
        )
    if not holds:
        return trouble("file locks", f"{place}: a lock does not keep another process out", remedy)
    return well("file locks", f"a lock at {place} keeps other processes of this machine out")

"""Saving and loading by all ranks of a run together, in the background of training.

A save has two halves. The training thread copies this rank's share of the state into host memory (`Stage`), which takes
a moment, and goes on with the next step, which changes the tensors. A thread of its own then writes the copy, agrees
with those of the other ranks, and rank 0 commits. So training stalls for the copy and not for the disk. The next save
waits for the one before, whose memory it uses again.

Every rank writes a share, and not rank 0 everything, because with shards rank 0 does not have everything, and because
many nodes write faster than one. The ranks agree over a process group of their own, `saves` (job.runtime.distributed):
the training thread uses the others at the same time.

Each rank hashes its own share while writing it: the hash is of what was meant to be written, so a disk that wrote
something else is found out when the checkpoint is read. At a start the ranks of a node share the hashing of all files.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import checkpoint_names
from job.checkpoint_names import TEMPORARY, directory_name, share_name
from job.errors import JobError, RetryError, StoppedError, UserError
from job.files import storage_problem
from job.runtime import distributed
from job.runtime.checkpoint import Checkpoint, clean_up, commit, read_into, remove, validate
from job.runtime.distributed import Process
from job.runtime.tensorfile import Stage, share

LOCK_SECONDS = 60  # a run that was told to stop may still be saving when its successor starts
LOCK_POLL_SECONDS = 0.2  # also how long Ctrl-C may take to end the waiting
SET_ASIDE = "damaged_"  # prefix of a checkpoint that is kept, but not looked at any more


@dataclass
class SaveStats:
    """Counters of this rank since the start; seconds and bytes of the last save."""

    saves: int = 0
    failures: int = 0
    last_save_seconds: float = 0.0  # from save() to the commit
    last_stall_seconds: float = 0.0  # of which the training thread waited
    bytes: int = 0  # this rank's share


class Checkpointer:
    """Saves, finds and loads the checkpoints of a run. All ranks call every method, in the same order.

    Raises RetryError when another run writes into the directory, StoppedError when a stop came while waiting for it.

    `beat` is called about once a second while a wait for a save makes progress (the watchdog's beat); `stop` gives the
    name of a signal that this process has received.
    """

    def __init__(
        self,
        directory: Path,
        process: Process,
        *,
        keep_last: int,
        keep_every: int,
        log: Callable[[str], None] = print,
        beat: Callable[[], object] = lambda: None,
        stop: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.directory, self.process, self.stats = directory, process, SaveStats()
        self._keep_last, self._keep_every, self._log, self._beat = keep_last, keep_every, log, beat
        self._stage: Stage | None = None
        self._thread: threading.Thread | None = None
        self._succeeded = True  # the last save
        self._written = 0  # bytes of the save in progress
        self._share_done = False  # of the save in progress
        self._invalid: set[int] = set()  # steps of checkpoints found damaged
        self._newest: int | None = None
        self._unwritable: OSError | None = None
        nodes = distributed.gather(process.node)
        self._node_ranks = [rank for rank, node in enumerate(nodes) if node == process.node]
        problem = distributed.gather(self._lock(stop) if process.is_main else None)[0]
        if problem:
            raise problem
        if process.is_main:
            clean_up(directory)
        distributed.barrier()

    def _lock(self, stop: Callable[[], str | None]) -> JobError | None:
        """Make this run the directory's only writer; waits for a run that is just ending. What is wrong, or None.

        Two schedulers' restarts of one run, or a run whose old node was only thought dead, would otherwise remove each
        other's files. The kernel drops the lock with the process, however that ends.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock_file = (self.directory / ".lock").open("a")
        except OSError as error:
            self._unwritable = error
            return None
        waited_from = time.monotonic()
        in_use = ""
        while True:
            try:
                fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._sign_lock()
                return None
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    self._log(f"warning: {self.directory} cannot be locked ({error}); do not start this run twice")
                    return None
            if not in_use:
                in_use = f"{self.directory} is in use by {self._lock_holder()}"
                self._log(f"{in_use}; waiting up to {LOCK_SECONDS} s for it to end (Ctrl-C ends the waiting)")
            if signal := stop():
                return StoppedError(f"stopped ({signal}) while waiting: {in_use}")
            if time.monotonic() - waited_from > LOCK_SECONDS:
                return RetryError(
                    f"{in_use}, which has not ended for {LOCK_SECONDS} s; end it, or choose another logging.run_name"
                )
            self._beat()
            time.sleep(LOCK_POLL_SECONDS)

    def _sign_lock(self) -> None:
        """Write into the lock file who holds it, for people: the lock itself is the kernel's."""
        process = self.process
        holder = {
            "node": process.node,
            "pid": os.getpid(),
            "job": None if process.job_id == "local" else process.job_id,
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        with suppress(OSError):
            self._lock_file.truncate(0)
            self._lock_file.write(json.dumps(holder) + "\n")
            self._lock_file.flush()

    def _lock_holder(self) -> str:
        """Who holds the lock, in words."""
        try:
            holder = json.loads((self.directory / ".lock").read_text())
            job = f" (job {holder['job']})" if holder["job"] else ""
            return f"process {holder['pid']} on {holder['node']}{job} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # of an older version, or just being written
            return "another process"

    def refuse_unwritable(self) -> None:
        """Refuse to train into a directory that cannot be written. UserError, on every rank."""
        unwritable = distributed.gather(self._unwritable)[0]
        if unwritable is not None:
            problem = storage_problem(unwritable) or f"{self.directory}: {unwritable}"
            raise UserError(f"no checkpoint could be saved: {problem}")

    # Loading

    def newest_valid(self) -> Checkpoint | None:
        """The newest checkpoint that every rank finds valid; others are named in one line each and left alone.

        Ranks of one node share the hashing, and every node reads all files: a node's cache or mount may be the one that
        is wrong. Raises LostRankError when a rank is lost.
        """
        part = self._node_ranks.index(self.process.rank)
        for step in sorted(set().union(*distributed.gather(checkpoint_names.steps(self.directory))), reverse=True):
            path = self.directory / directory_name(step)
            found = validate(path, part, len(self._node_ranks))
            problems = distributed.gather(found if isinstance(found, str) else None)
            problem = next((f"{text} (rank {rank})" for rank, text in enumerate(problems) if text), None)
            if problem is None and isinstance(found, Checkpoint):
                self._newest = step
                return found
            self._invalid.add(step)
            if self.process.is_main:
                self._log(f"checkpoint {path} is not valid and is skipped: {problem}")
        return None

    @property
    def damaged(self) -> list[Path]:
        """Checkpoints that `newest_valid` came by and found damaged."""
        return [self.directory / directory_name(step) for step in sorted(self._invalid)]

    def set_aside_damaged(self) -> None:
        """Rename damaged checkpoints, so that a run that starts anew in their directory does not write over them.

        Someone may still save a part of them. Raises OSError.
        """
        if self.process.is_main:
            for path in self.damaged:
                aside = path.with_name(SET_ASIDE + path.name)
                while aside.exists():
                    aside = aside.with_name(aside.name + "_")
                path.rename(aside)
                self._log(f"{path} is damaged and is kept as {aside.name}")
        distributed.barrier()
        self._invalid.clear()

    def load(self, checkpoint: Checkpoint, tensors: dict[str, Any]) -> dict[str, Any]:
        """Copy a checkpoint into the given tensors, in place and bit for bit; returns its record.

        Raises UserError, before anything is changed, when names, shapes or types differ.
        """
        read_into(checkpoint, tensors)
        return checkpoint.record

    # Saving, in the training thread

    def prepare(self, tensors: dict[str, Any]) -> None:
        """Allocate the staging memory ahead, so that the first save stalls no longer than the others."""
        pieces = share(tensors, self.process.rank, self.process.world_size)
        if self._stage is None or self._stage.layout != Stage.describe(pieces):
            self._stage = Stage(pieces)

    def save(self, step: int, tensors: dict[str, Any], record: dict[str, Any], *, blocking: bool = False) -> None:
        """Save a nested state dict of tensors (equal on all ranks, or DTensors) and a small JSON record as `step`.

        Returns once the tensors are staged (and an earlier save has ended); a failure is logged, counted, and told by
        `wait`. It does not end the run: a full disk may have room again at the next save.
        """
        started = time.monotonic()
        self.wait()
        if step == self._newest:  # the same step is the same state
            self._succeeded = True
            return
        self.prepare(tensors)
        assert self._stage is not None
        self._stage.copy(share(tensors, self.process.rank, self.process.world_size))
        self._written, self._share_done = 0, False
        # The record is made text here: the caller may go on to change what is in it.
        arguments = (self._stage, step, json.dumps(record), started)
        self._thread = threading.Thread(target=self._save_staged, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if blocking:
            self.wait()
        self.stats.last_stall_seconds = time.monotonic() - started

    def wait(self) -> bool:
        """Wait for a save in progress. True when the last save succeeded."""
        thread, self._thread = self._thread, None
        before = -1
        while thread is not None and thread.is_alive():
            thread.join(1.0)
            if self._written > before or (self._share_done and thread.is_alive() and self._others_alive()):
                before = self._written
                self._beat()
        return self._succeeded

    def _others_alive(self) -> bool:
        """Whether this rank may go on waiting for the others to finish their shares.

        A slow disk is no reason to end the run: each rank's own watchdog ends it when its writing makes no progress.
        That of a frozen process does not run; such a rank must be noticed from here.
        """
        return distributed.missing() is None

    # Saving, in the thread of the save

    def _save_staged(self, stage: Stage, step: int, record: str, started: float) -> None:
        """On every rank: write the share, agree, and let rank 0 commit."""
        try:
            error = self._write_and_commit(stage, step, record)
        except RuntimeError as lost:  # the training thread comes upon the loss too, and ends the run
            error = f"another rank was lost ({str(lost).splitlines()[0]})"
        self._succeeded = error is None
        if error is None:
            self._newest = step
            self._invalid.discard(step)
            self.stats.saves += 1
            self.stats.last_save_seconds = time.monotonic() - started
            if self.process.is_main:
                self._retain(step)
        else:
            self.stats.failures += 1
            if self.process.is_main:
                self._log(f"warning: checkpoint at step {step} failed, earlier ones are kept: {error}")
                shutil.rmtree(self._temporary(step), ignore_errors=True)

    def _write_and_commit(self, stage: Stage, step: int, record: str) -> str | None:
        """What went wrong, the same on every rank; None when the checkpoint is complete. RuntimeError: lost a rank."""
        outcomes = distributed.gather(self._write_share(stage, self._temporary(step)), "saves")
        problems = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        error = problems[0] if problems else None
        if error is None and self.process.is_main:
            try:
                commit(self.directory, step, json.loads(record), outcomes)
            except OSError as failure:
                error = f"rank 0: {failure}"
        return distributed.gather(error, "saves")[0]

    def _write_share(self, stage: Stage, temporary: Path) -> dict[str, Any] | str:
        """Name, size and hash of the file that this rank has written, or why it could not."""
        name = share_name(self.process.rank, self.process.world_size)
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            self.stats.bytes, digest = stage.write(temporary / name, self._progress)
            return {"name": name, "bytes": self.stats.bytes, "sha256": digest}
        except OSError as error:
            return str(error)
        finally:
            self._share_done = True

    def _progress(self, written: int) -> None:
        self._written = written

    def _temporary(self, step: int) -> Path:
        return self.directory / (directory_name(step) + TEMPORARY)

    def _retain(self, newest: int) -> None:
        """Remove what is neither among the keep_last newest nor a multiple of keep_every.

        Checkpoints of later steps stay: a run that was told to go on from an earlier one will come by them. Damaged
        ones count for nothing, or they could push out the last valid one.
        """
        steps = [step for step in checkpoint_names.steps(self.directory) if step <= newest]
        valid = [step for step in steps if step not in self._invalid]
        kept = set(valid[-self._keep_last :])
        if self._keep_every:
            kept |= {step for step in valid if step % self._keep_every == 0}
        for step in set(steps) - kept:
            try:
                remove(self.directory / directory_name(step))
            except OSError as error:
                self._log(f"warning: old checkpoint {directory_name(step)} could not be removed: {error}")

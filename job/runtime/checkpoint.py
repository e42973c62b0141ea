"""Checkpoints that are whole or absent: every rank writes its share from a staged copy, in the background; a commit marker comes last.

RUN/checkpoints/step_00001234/ holds share_00000_of_00002.safetensors ... and commit.json: step, record, and size and SHA-256 of
every share. It is written as step_00001234.tmp, flushed, and renamed. Nothing in it is pickled, so reading one runs no code.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from job import checkpoint_names
from job.checkpoint_names import COMMIT_FILE, TEMPORARY, directory_name, share_name, step_of
from job.errors import RetryError, UserError
from job.runtime import distributed
from job.runtime.distributed import Process
from job.runtime.tensorfile import DTYPES, Reader, Stage, flatten, piece, sha256, share

LOCK_SECONDS = 60  # a run that was told to stop may still be saving when its successor starts


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: `record` is what was given to save besides the tensors."""

    step: int
    path: Path
    record: dict[str, Any]
    files: tuple[Path, ...]


@dataclass
class SaveStats:
    """Counters of this rank since the start; seconds and bytes of the last save."""

    saves: int = 0
    failures: int = 0
    last_save_seconds: float = 0.0  # from save() to the commit
    last_stall_seconds: float = 0.0  # of which the training thread waited
    bytes: int = 0  # this rank's share


def _digest(commit: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(commit, sort_keys=True).encode()).hexdigest()


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check(path: Path, part: int = 0, parts: int = 1) -> Checkpoint | str:
    """The checkpoint, or what is wrong with it. Hashes every `parts`-th share from `part` on; sizes are checked of all."""
    try:
        written = json.loads((path / COMMIT_FILE).read_text())
        commit = written["commit"]
        if written["sha256"] != _digest(commit):
            return f"{COMMIT_FILE} is damaged"
        files = tuple(path / entry["name"] for entry in commit["files"])
        for file, entry in zip(files, commit["files"], strict=True):
            if file.stat().st_size != entry["bytes"]:
                return f"{file.name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        for file, entry in list(zip(files, commit["files"], strict=True))[part::parts]:
            if sha256(file) != entry["sha256"]:
                return f"{file.name} is damaged (SHA-256 differs)"
        return Checkpoint(commit["step"], path, commit["record"], files)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"cannot be read ({error})"
    except (ValueError, KeyError, TypeError):
        return f"{COMMIT_FILE} is damaged"


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a directory, or the newest valid one of a run directory. Raises UserError when there is none."""
    if (path / checkpoint_names.DIRECTORY).is_dir():
        path = path / checkpoint_names.DIRECTORY
    if not (path / COMMIT_FILE).exists() and checkpoint_names.steps(path):
        for step in reversed(checkpoint_names.steps(path)):
            found = _check(path / directory_name(step))
            if isinstance(found, Checkpoint):
                return found
        raise UserError(
            f"{path}: none of the {len(checkpoint_names.steps(path))} checkpoints is valid; the newest: {found}"
        )
    found = _check(path)
    if isinstance(found, str):
        raise UserError(
            f"{path} is not a valid checkpoint: {found}; give a directory like RUN/checkpoints/{directory_name(1000)}"
        )
    return found


def read_weights(checkpoint: Checkpoint, prefix: str = "") -> dict[str, torch.Tensor]:
    """Whole tensors whose dotted name starts with `prefix` (taken off), on the CPU; needs no process group."""
    reader = Reader(list(checkpoint.files))
    return {name.removeprefix(prefix): reader.tensor(name) for name in reader.shapes if name.startswith(prefix)}


class Checkpointer:
    """Saves, finds and loads the checkpoints of a run. All ranks call every method, in the same order.

    Raises RetryError when another run writes into the directory.

    beat is called about once a second while a wait for a save makes progress (the watchdog's beat).
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
    ) -> None:
        self.directory, self.process, self.stats = directory, process, SaveStats()
        self._keep_last, self._keep_every, self._log, self._beat = keep_last, keep_every, log, beat
        self._stage: Stage | None = None
        self._thread: threading.Thread | None = None
        self._succeeded, self._written, self._share_done = True, 0, False
        self._invalid: set[int] = set()
        self._newest: int | None = None
        nodes = distributed.gather(process.node)
        self._node_ranks = [rank for rank, node in enumerate(nodes) if node == process.node]
        problem = distributed.gather(self._lock() if process.is_main else None)[0]
        if problem:
            raise RetryError(problem)
        if process.is_main:
            for leftover in checkpoint_names.unfinished(directory):
                self._clean(leftover)
        distributed.barrier()

    def prepare(self, tensors: dict[str, Any]) -> None:
        """Allocate the staging memory ahead, so that the first save stalls no longer than the others."""
        pieces = share(tensors, self.process.rank, self.process.world_size)
        if self._stage is None or self._stage.layout != Stage.describe(pieces):
            self._stage = Stage(pieces)

    def save(self, step: int, tensors: dict[str, Any], record: dict[str, Any], *, blocking: bool = False) -> None:
        """Save a nested state dict of tensors (equal on all ranks, or DTensors) and a small JSON record as `step`.

        Returns once the tensors are staged (and an earlier save has ended); a failure is logged, counted, and told by `wait`.
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
        self._thread = threading.Thread(
            target=self._run, args=(step, json.dumps(record), started), name="checkpoint", daemon=True
        )
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
            # Others still writing are guarded by their own watchdogs; only frozen ones must not be waited for.
            if self._written > before or (self._share_done and thread.is_alive() and distributed.missing()[0] is None):
                before = self._written
                self._beat()
        return self._succeeded

    def newest_valid(self) -> Checkpoint | None:
        """The newest checkpoint that every rank finds valid; others are named in one line each and left alone.

        Ranks of one node share the hashing. Raises RetryError when a rank is lost.
        """
        part = self._node_ranks.index(self.process.rank)
        for step in sorted(set().union(*distributed.gather(checkpoint_names.steps(self.directory))), reverse=True):
            found = _check(self.directory / directory_name(step), part, len(self._node_ranks))
            problems = distributed.gather(found if isinstance(found, str) else None)
            problem = next((f"{text} (rank {rank})" for rank, text in enumerate(problems) if text), None)
            if problem is None and isinstance(found, Checkpoint):
                self._newest = step
                return found
            self._invalid.add(step)
            if self.process.is_main:
                self._log(f"checkpoint {self.directory / directory_name(step)} is not valid and is skipped: {problem}")
        return None

    def load(self, checkpoint: Checkpoint, tensors: dict[str, Any]) -> dict[str, Any]:
        """Copy a checkpoint into the given tensors, in place and bit for bit; returns its record.

        Raises UserError, before anything is changed, when names, shapes or types differ.
        """
        reader, wanted = Reader(list(checkpoint.files)), dict(flatten(tensors))
        problems = [f"{name} is missing" for name in wanted if name not in reader.shapes]
        problems += [f"{name} is unknown here" for name in reader.shapes if name not in wanted]
        for name, tensor in wanted.items():
            there, here = (
                (reader.dtypes.get(name), reader.shapes.get(name)),
                (DTYPES[tensor.dtype], tuple(tensor.shape)),
            )
            if name in reader.shapes and there != here:
                problems.append(f"{name} is {there[0]} {list(there[1] or ())} there, {here[0]} {list(here[1])} here")
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"{checkpoint.path} does not fit this model: {'; '.join(problems[:3])}{more}")
        for name, tensor in wanted.items():
            target = piece(tensor)
            reader.read(name, target.local, target.offset)
        return checkpoint.record

    def _run(self, step: int, record: str, started: float) -> None:
        """In the background, on every rank: write the share, agree, and let rank 0 commit."""
        temporary = self.directory / (directory_name(step) + TEMPORARY)
        try:
            outcomes = distributed.gather(self._write_share(temporary), "saves")
            error = next(
                (f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)), None
            )
            if self.process.is_main:
                error = error or self._commit(
                    temporary, {"step": step, "record": json.loads(record), "files": outcomes}
                )
            error = distributed.gather(error, "saves")[0]
        except RuntimeError as lost:
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
                shutil.rmtree(temporary, ignore_errors=True)

    def _write_share(self, temporary: Path) -> dict[str, Any] | str:
        assert self._stage is not None
        name = share_name(self.process.rank, self.process.world_size)
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            self.stats.bytes, digest = self._stage.write(temporary / name, self._progress)
            return {"name": name, "bytes": self.stats.bytes, "sha256": digest}
        except OSError as error:
            return str(error)
        finally:
            self._share_done = True

    def _progress(self, written: int) -> None:
        self._written = written

    def _commit(self, temporary: Path, commit: dict[str, Any]) -> str | None:
        final = self.directory / directory_name(commit["step"])
        try:
            with (temporary / COMMIT_FILE).open("w") as file:
                json.dump({"commit": commit, "sha256": _digest(commit)}, file)
                file.flush()
                os.fsync(file.fileno())
            _sync_directory(temporary)
            if final.exists():  # found invalid at the start, or it would be the newest
                self._remove(final)
            temporary.rename(final)
            _sync_directory(self.directory)
        except OSError as error:
            return f"rank 0: {error}"
        return None

    def _retain(self, newest: int) -> None:
        """Remove what is neither among the keep_last newest nor a multiple of keep_every; later steps, invalid ones, are left to be written again."""
        steps = [step for step in checkpoint_names.steps(self.directory) if step <= newest]
        valid = [step for step in steps if step not in self._invalid]
        kept = set(valid[-self._keep_last :]) | {
            step for step in valid if self._keep_every and step % self._keep_every == 0
        }
        for step in set(steps) - kept:
            try:
                self._remove(self.directory / directory_name(step))
            except OSError as error:
                self._log(f"warning: old checkpoint {directory_name(step)} could not be removed: {error}")

    def _lock(self) -> str | None:
        """Make this run the directory's only writer; waits for a run that is just ending. What is wrong, or None."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock_file = (self.directory / ".lock").open("a")
        except OSError:  # not writable: every save will say so
            return None
        for _ in range(LOCK_SECONDS):
            try:
                fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    self._log(f"warning: {self.directory} cannot be locked ({error}); do not start this run twice")
                    return None
            time.sleep(1.0)
        return f"{self.directory} is in use by another process that has not ended for {LOCK_SECONDS} s; end it, or choose another logging.run_name"

    def _clean(self, leftover: Path) -> None:
        """Remove what a killed run left half-written; what was whole but for its name gets its name."""
        final = leftover.with_suffix("")
        if not final.exists() and step_of(final) is not None and isinstance(_check(leftover), Checkpoint):
            leftover.rename(final)
        shutil.rmtree(leftover, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        """Rename first: a kill in between leaves no checkpoint that looks damaged."""
        doomed = path.with_name(f"{path.name}.old{TEMPORARY}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)

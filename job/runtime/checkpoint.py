"""Checkpoints on disk: what makes one valid, finding and reading one, and the steps by which one appears or goes.

RUN/checkpoints/step_00001234/ holds a file per rank, share_00000_of_00002.safetensors ..., and the commit marker
commit.json: step, record, and size and SHA-256 of every share. Nothing in it is pickled, so reading one runs no code.
Everything here is done by a single process; `job.runtime.checkpointer` has the ranks save and load together.

How one appears: the ranks write their shares into step_00001234.tmp and flush them to disk. Then rank 0 writes the
commit marker there, flushes it and the directory, and renames the directory. A kill at any moment leaves either a
directory named *.tmp, which the next start removes, or a whole checkpoint. The marker tells shares that were written
from shares that were promised: a directory without one, or whose files differ from it, is not valid whatever its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from job import checkpoint_names
from job.checkpoint_names import COMMIT_FILE, TEMPORARY, directory_name, step_of
from job.errors import UserError
from job.runtime.tensorfile import DTYPES, Reader, flatten, piece, sha256


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: `record` is what was given to save besides the tensors."""

    step: int
    path: Path
    record: dict[str, Any]
    files: tuple[Path, ...]


# Finding and reading


def validate(path: Path, part: int = 0, parts: int = 1) -> Checkpoint | str:
    """The checkpoint in a directory, or what is wrong with it.

    Sizes are checked of all shares. Hashing takes as long as reading, so several processes divide it: this one hashes
    every `parts`-th share from `part` on.
    """
    try:
        written = json.loads((path / COMMIT_FILE).read_text())
        content = written["commit"]
        if written["sha256"] != _digest(content):
            return f"{COMMIT_FILE} is damaged"
        shares = [(path / entry["name"], entry) for entry in content["files"]]
        for file, entry in shares:
            if file.stat().st_size != entry["bytes"]:
                return f"{file.name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        for file, entry in shares[part::parts]:
            if sha256(file) != entry["sha256"]:
                return f"{file.name} is damaged (SHA-256 differs)"
        return Checkpoint(content["step"], path, content["record"], tuple(file for file, _ in shares))
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"cannot be read ({error})"
    except (ValueError, KeyError, TypeError):
        return f"{COMMIT_FILE} is damaged"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a directory, or the newest valid one of a run directory. UserError when there is none.

    The run may be training. Nothing is locked: what it removes while this looks on is passed over, and where nothing
    is left of what was there, what has come in its place is looked at.
    """
    if (path / checkpoint_names.DIRECTORY).is_dir():
        path = path / checkpoint_names.DIRECTORY
    steps = checkpoint_names.steps(path)
    while steps and not (path / COMMIT_FILE).exists():
        found = _newest_of(path, steps)
        now = checkpoint_names.steps(path)
        if isinstance(found, Checkpoint):
            return found
        if now == steps:
            raise UserError(f"{path}: none of the {len(steps)} checkpoints is valid; the newest: {found}")
        steps = now
    found = validate(path)
    if isinstance(found, str):
        raise UserError(
            f"{path} is not a valid checkpoint: {found}; give a directory like RUN/checkpoints/{directory_name(1000)}"
        )
    return found


def _newest_of(directory: Path, steps: list[int]) -> Checkpoint | str:
    """The newest valid checkpoint of these steps, or what is wrong with the newest.

    Those that are passed over for it are named on standard error; not those that a run has removed meanwhile.
    """
    problems: dict[Path, str] = {}
    for step in reversed(steps):
        path = directory / directory_name(step)
        found = validate(path)
        if isinstance(found, Checkpoint):
            for damaged, problem in problems.items():
                if damaged.exists():
                    print(f"warning: {damaged}: {problem}; step {step} is taken instead", file=sys.stderr, flush=True)
            return found
        problems[path] = found
    return next(iter(problems.values()))


def read_weights(checkpoint: Checkpoint, prefix: str = "") -> dict[str, torch.Tensor]:
    """Whole tensors whose dotted name starts with `prefix` (taken off), on the CPU; needs no process group."""
    reader = Reader(list(checkpoint.files))
    return {name.removeprefix(prefix): reader.tensor(name) for name in reader.shapes if name.startswith(prefix)}


def read_into(checkpoint: Checkpoint, tensors: dict[str, Any]) -> None:
    """Copy a checkpoint into the tensors of a nested state dict, in place and bit for bit; of DTensors, this shard.

    Raises UserError, before anything is changed, when names, shapes or types differ.
    """
    reader, wanted = Reader(list(checkpoint.files)), dict(flatten(tensors))
    problems = [f"{name} is missing" for name in wanted if name not in reader.shapes]
    problems += [f"{name} is unknown here" for name in reader.shapes if name not in wanted]
    for name, tensor in wanted.items():
        if name in reader.shapes:
            there = f"{reader.dtypes[name]} {list(reader.shapes[name])}"
            here = f"{DTYPES[tensor.dtype]} {list(tensor.shape)}"
            if there != here:
                problems.append(f"{name} is {there} there, {here} here")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{checkpoint.path} does not fit this model: {'; '.join(problems[:3])}{more}")
    for name, tensor in wanted.items():
        target = piece(tensor)
        reader.read(name, target.local, target.offset)


# Appearing and going


def commit(directory: Path, step: int, record: dict[str, Any], files: list[dict[str, Any]]) -> None:
    """Make a checkpoint of the shares that the ranks have written and flushed: `files` has their names, sizes, hashes.

    Raises OSError; what was there before is then still there.
    """
    temporary, final = directory / (directory_name(step) + TEMPORARY), directory / directory_name(step)
    content = {"step": step, "record": record, "files": files}
    with (temporary / COMMIT_FILE).open("w") as file:
        json.dump({"commit": content, "sha256": _digest(content)}, file)
        file.flush()
        os.fsync(file.fileno())
    # The names of files are data of their directory: without this flush a power cut could leave the renamed directory
    # without the files in it, and without the next one it could undo the rename.
    _sync_directory(temporary)
    if final.exists():  # damaged, or of a run that then went back to an earlier step and comes by this one again
        remove(final)
    temporary.rename(final)
    _sync_directory(directory)


def remove(path: Path) -> None:
    """Remove a checkpoint. Raises OSError.

    It is renamed first: a kill in the middle of the removal would otherwise leave a checkpoint that looks damaged, and
    the next start would warn about it.
    """
    doomed = path.with_name(f"{path.name}.old{TEMPORARY}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def clean_up(directory: Path) -> None:
    """Finish a rename that a kill interrupted; remove what else a killed run left unfinished."""
    for leftover in checkpoint_names.unfinished(directory):
        final = leftover.with_suffix("")
        # The marker is written last, so a valid directory lacks nothing but its name. step_N.old.tmp is no such case:
        # its name says that it was being removed.
        if not final.exists() and step_of(final) is not None and isinstance(validate(leftover), Checkpoint):
            leftover.rename(final)
        shutil.rmtree(leftover, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

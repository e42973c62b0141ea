"""A prepared dataset of a store (data.dir=s3://...), copied once into a directory of each node and read there.

CACHE/NAME-DIGEST/         the files of the dataset; dataset.json, which comes last, says that all others are there
CACHE/.NAME-DIGEST.lock    held by the process that copies

DIGEST is of the URL and of the content of dataset.json, which has the hashes of all other files: data that was prepared
anew under the same URL is another copy. A copy that was interrupted goes on with the files that are missing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from job.data.console import CountedWork, say
from job.data.remote import RemoteDirectory
from job.data.shards import INFO_FILE, DatasetInfo, info_of, shard_file
from job.errors import StoppedError, UserError
from job.files import file_entry, write_whole

AT_ONCE = 8  # files that are copied together
POLL_SECONDS = 0.2
DIGITS = 16  # of a digest, in a name
HEADER_BYTES = 128  # before the numbers, in a file of offsets
OFFSET_BYTES = 8
HELD = (errno.EACCES, errno.EAGAIN)
SEE = "see docs: how-to/read-from-a-store"

Stop = Callable[[], bool]


def never() -> bool:
    """Of a copy that nobody stops."""
    return False


@dataclass(frozen=True)
class _Wanted:
    """A file that a copy lacks."""

    name: str
    entry: dict[str, Any]  # of dataset.json


def info_at(url: str) -> DatasetInfo | None:
    """What the dataset.json of a URL says; None without one.

    UserError where it is damaged, or the store cannot be asked.
    """
    content = RemoteDirectory(url).read(INFO_FILE)
    return info_of(content, f"{url}/{INFO_FILE}") if content is not None else None


def first_lengths(url: str, info: DatasetInfo, count: int) -> np.ndarray:
    """Token counts, int64, of the first training rows of a URL's dataset: `count`, or as many as there are.

    Only the beginning of a file of offsets is asked for. UserError where it is missing or damaged.
    """
    store, lengths, left = RemoteDirectory(url), [np.zeros(0, np.int64)], count
    for number, rows in enumerate(info.shards["train"]):
        wanted = min(rows, left)
        if wanted == 0:
            break
        name = shard_file("train", number, "offsets")
        content = store.read(name, HEADER_BYTES + OFFSET_BYTES * (wanted + 1))
        if content is None:
            raise UserError(f"{url}/{name}: missing; copy the dataset there again")
        lengths.append(np.diff(_first_numbers(content, wanted + 1, f"{url}/{name}")))
        left -= wanted
    return np.concatenate(lengths)


def _first_numbers(content: bytes, count: int, where: str) -> np.ndarray:
    """The first `count` numbers, int64, of a file of numpy's that begins so. UserError where there are fewer."""
    file = io.BytesIO(content)
    try:
        np.lib.format.read_magic(file)
        dtype = np.lib.format.read_array_header_1_0(file)[2]
        return np.frombuffer(content, dtype, count, file.tell()).astype(np.int64)
    except ValueError as error:
        raise UserError(f"{where}: damaged ({error}); copy the dataset there again") from error


def local_copy(url: str, cache: Path, stop: Stop = never) -> Path:
    """The directory with the copy of a URL's dataset, made if need be by one process, for which all others wait.

    UserError where it is no dataset, or does not fit; RetryError where the store fails; StoppedError once `stop` says
    so.
    """
    store = RemoteDirectory(url)
    content = store.read(INFO_FILE)
    if content is None:
        raise UserError(f"{url}: no finished dataset there ({INFO_FILE} is missing); {SEE}")
    info = info_of(content, f"{url}/{INFO_FILE}")
    digest = hashlib.sha256(f"{url}\n".encode() + content).hexdigest()[:DIGITS]
    copy = cache / f"{url.rstrip('/').rpartition('/')[2]}-{digest}"
    if not (copy / INFO_FILE).is_file():
        copy.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{copy.name}.lock", stop):
            if not (copy / INFO_FILE).is_file():  # another process may have made it
                _copy(store, info, copy, stop)
                write_whole(copy / INFO_FILE, lambda file: file.write(content))
    return copy


def _copy(store: RemoteDirectory, info: DatasetInfo, copy: Path, stop: Stop) -> None:
    """Copy all files that are missing, several at a time."""
    wanted: queue.SimpleQueue[_Wanted] = queue.SimpleQueue()
    needed = 0
    for name, entry in info.files.items():
        if Path(name).name != name:
            raise UserError(f"{store.url}/{INFO_FILE}: damaged, {name!r} is no name of a file")
        if not (copy / name).is_file():  # it appears when its hash is right
            wanted.put(_Wanted(name, entry))
            needed += entry["bytes"]
    free = shutil.disk_usage(copy).free
    if needed > free:
        raise UserError(
            f"data.cache_dir={copy.parent}: {store.url} needs {needed / 1e6:,.1f} MB more there, "
            f"{free / 1e6:,.1f} MB are free; name a larger disk, or delete copies that are no longer used"
        )
    say(f"copying {store.url} to {copy} ({needed / 1e6:,.1f} MB)")
    failures: list[Exception] = []

    def ended() -> bool:
        return stop() or bool(failures)

    with CountedWork("bytes", needed) as work:
        # Daemons, which the process does not wait for: a stop would last as long as all the files.
        threads = [
            threading.Thread(target=_copy_files, args=(store, copy, wanted, work, ended, failures), daemon=True)
            for _ in range(AT_ONCE)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    if stop():
        raise StoppedError(f"stopped while {store.url} was copied; the same command goes on")


def _copy_files(
    store: RemoteDirectory,
    copy: Path,
    wanted: queue.SimpleQueue[_Wanted],
    work: CountedWork,
    ended: Stop,
    failures: list[Exception],
) -> None:
    """Copy files until there are no more."""
    try:
        while not ended():
            file = wanted.get_nowait()
            _copy_file(store, copy, file, work, ended)
    except queue.Empty:
        return
    except Exception as error:
        failures.append(error)


def _copy_file(store: RemoteDirectory, copy: Path, file: _Wanted, work: CountedWork, ended: Stop) -> None:
    """Copy a file, which appears whole and with the right hash or not at all."""
    partial = copy / f".{file.name}.partial"
    try:
        with partial.open("wb") as target:
            for block in store.blocks(file.name):
                if ended():
                    return
                target.write(block)
                work.add(len(block))
    except OSError as error:
        if error.filename is None:  # a full disk names no file
            error.filename = str(partial)
        raise
    if file_entry(partial) != file.entry:
        raise UserError(
            f"{store.url}/{file.name}: corrupt, its size or SHA-256 is not the one in {INFO_FILE}; "
            "copy the dataset there again"
        )
    partial.rename(copy / file.name)


@contextmanager
def _locked(path: Path, stop: Stop) -> Iterator[None]:
    """Hold a file's lock, which goes with the process that has it."""
    is_told = False
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in HELD:
                    raise UserError(
                        f"{path}: cannot be locked ({error.strerror}); name a disk of the node with data.cache_dir"
                    ) from error
            if stop():
                raise StoppedError(f"stopped while another process copied to {path.parent}; the same command goes on")
            if not is_told:
                is_told = True
                say(f"another process copies to {path.parent}; waiting for it")
            time.sleep(POLL_SECONDS)
        yield

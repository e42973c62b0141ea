"""Files of remote stores, through fsspec: s3://bucket/texts/*.jsonl.gz, gs://, hf://, https:// and what else it knows.

Where a store is and who asks are for fsspec and the store's own library to know: from the environment, their
configuration files, or the machine's role. Nothing of that passes through here, or into a dataset.
"""

from __future__ import annotations

import errno
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from job.data.console import CountedWork, say
from job.data.optional import import_optional
from job.errors import RetryError, UserError
from job.files import SCHEME, is_url, write_whole

GLOB_CHARACTERS = "*?["
READ_AT_ONCE = 2**23  # bytes asked for at once; s3fs takes 50 MB of its own accord, also for the first of ten texts
# What a store says of the content of a file, the first that is there.
HASHES = ("ETag", "etag", "md5Hash", "blob_id")
TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
SEE = "see docs: how-to/read-from-a-store"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store; what `pathlib.Path` has of a name is called the same here."""

    url: str
    size: int
    version: str  # changes with the content; empty where a store says nothing

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return PurePosixPath(self.url).name

    def open(self, mode: str) -> BinaryIO:
        """The file's bytes (`mode` is "rb"), read as they are asked for; an OSError for whatever goes wrong."""
        filesystem, path = _filesystem(self.url)
        with _as_os_error():
            file = filesystem.open(path, mode, block_size=READ_AT_ONCE)
        return io.BufferedReader(_RawFile(file), io.DEFAULT_BUFFER_SIZE)


class RemoteDirectory:
    """A directory of a store, whose files are known by name."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._filesystem, self._path = _filesystem(self.url)

    def read(self, name: str, size: int | None = None) -> bytes | None:
        """A file's content, or its first `size` bytes; None without it. UserError where the store cannot be asked."""
        try:
            return bytes(self._filesystem.cat_file(f"{self._path}/{name}", start=None if size is None else 0, end=size))
        except FileNotFoundError:
            return None
        except Exception as error:  # each store's library has its own kinds
            raise UserError(f"{self.url}: cannot be read ({problem_of(error)}); {SEE}") from error

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file's content, a part at a time. UserError without it, RetryError where the store fails."""
        try:
            with self._filesystem.open(f"{self._path}/{name}", "rb", block_size=READ_AT_ONCE) as file:
                while block := file.read(READ_AT_ONCE):
                    yield block
        except FileNotFoundError as error:
            raise UserError(f"{self.url}/{name}: missing; copy the dataset there again") from error
        except Exception as error:
            raise RetryError(f"{self.url}/{name}: cannot be read ({problem_of(error)})") from error


def find_remote(source: str, is_of_directory: Callable[[str], bool], option: str = "--source") -> list[RemoteFile]:
    """Files of a URL, sorted: one file, those of a glob, or those below a directory whose name `is_of_directory` takes.

    UserError where there are none, or the store cannot be asked.
    """
    filesystem, path = _filesystem(source)
    filesystem.invalidate_cache()  # what was listed before may have changed
    try:
        found, is_directory = _listed(filesystem, path)
    except FileNotFoundError:
        found, is_directory = {}, False
    except Exception as error:  # each store's library has its own kinds
        raise UserError(f"{option} {source}: cannot be read ({problem_of(error)}); {SEE}") from error

    def is_read(name: str) -> bool:
        """Of a directory no other kinds of files; nothing hidden unless it is named, as of directories here."""
        below = set(PurePosixPath(name).parts) - set(PurePosixPath(path).parts)
        if any(part.startswith(".") for part in below):
            return False
        return not is_directory or is_of_directory(PurePosixPath(name).name)

    files = [
        _remote_file(filesystem, name, info) for name, info in found.items() if info["type"] == "file" and is_read(name)
    ]
    if not files:
        raise UserError(f"{option} {source}: no file there that is read (or no such bucket); {SEE}")
    return sorted(files, key=str)


def fetch(name: str, option: str, target: Path) -> Path:
    """The file that an option names: its own path, or of the URL of a store that of a copy, `target`.

    UserError where it is not there, cannot be read, or does not fit.
    """
    if not is_url(name):
        return Path(name)
    file = find_one(name, option)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if file.size > free:
        raise UserError(
            f"{option} {file}: its copy needs {file.size / 1e6:,.1f} MB in {target.parent}, "
            f"{free / 1e6:,.1f} MB are free"
        )
    say(f"copying {file} ({file.size / 1e6:,.1f} MB)")
    with CountedWork("bytes", file.size) as work:
        write_whole(target, lambda copy: _copy(file, option, copy, work))
    return target


def _copy(file: RemoteFile, option: str, target: BinaryIO, work: CountedWork) -> None:
    """Write a file's content. UserError where it cannot be read: errors of the store are not those of the disk."""
    with _one_line(f"{option} {file}"):
        source = file.open("rb")
    with source:
        while True:
            with _one_line(f"{option} {file}"):
                block = source.read(READ_AT_ONCE)
            if not block:
                return
            target.write(block)
            work.add(len(block))


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from error


def find_one(url: str, option: str) -> RemoteFile:
    """The file of a URL. UserError where there is none, or more than one."""
    found = find_remote(url, lambda _: True, option)
    if len(found) > 1:
        raise UserError(f"{option} {url}: {len(found)} files there; name one of them")
    return found[0]


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's object for a store, and the path within it. UserError where its package is missing."""
    user, at, _ = url.partition(SCHEME)[2].partition("/")[0].rpartition("@")
    if at and ":" in user:
        raise UserError(
            f"a password in a URL would be written into dataset.json; give it to the store's library; {SEE}"
        )
    fsspec = import_optional("fsspec.core", "fsspec")
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except ImportError as error:
        # "Install s3fs to access S3"
        raise UserError(f"{url}: {problem_of(error)} (pip install 'cyclevae[remote]' has s3fs); {SEE}") from error
    except Exception as error:  # each store's library has its own kinds
        raise UserError(f"{url}: {problem_of(error)}; {SEE}") from error
    return filesystem, path


def _listed(filesystem: Any, path: str) -> tuple[dict[str, Any], bool]:
    """Paths and what the store knows of them, and whether they are all that is below a directory."""
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        if any(character in path for character in GLOB_CHARACTERS):
            return dict(filesystem.glob(path, detail=True)), False
        raise
    if info["type"] != "directory":
        return {path: info}, False
    return dict(filesystem.find(path, detail=True)), True


def _remote_file(filesystem: Any, path: str, info: dict[str, Any]) -> RemoteFile:
    """A file by what a listing says of it, or where that is no hash, by what the store says when asked for the file.

    A listing may say nothing of its content (https), or the time of writing in other words.
    """
    if not any(info.get(name) for name in HASHES):
        info = filesystem.info(path)
    version = next((str(info[name]) for name in (*HASHES, *TIMES) if info.get(name)), "")
    return RemoteFile(filesystem.unstrip_protocol(path), int(info.get("size") or 0), version)


def problem_of(error: BaseException) -> str:
    """The first line of an error, or its kind."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Errors of a store as the one kind that all who read files expect."""
    try:
        yield
    except Exception as error:
        raise OSError(errno.EIO, problem_of(error)) from error


class _RawFile(io.RawIOBase):
    """A file that fsspec has opened, whose errors are OSErrors."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _as_os_error():
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _as_os_error():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()

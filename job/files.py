"""Files and directories that appear whole or not at all, and their hashes."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import locale
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from job.errors import UserError

TEMPORARY = ".tmp"
SCHEME = "://"
LONGEST_NAME = 150  # bytes; file systems take 255, and names are parts of other names
# What is wrong with a disk or a path, and not with the program.
OF_STORAGE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EEXIST,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
}


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write beside, fsync, rename, fsync the directory: after a crash `path` has the old content or all of the new.

    Without the first fsync the rename could reach the disk before the content does, and leave an empty file of the
    right name; without the second the rename itself could be lost after the caller went on.

    A device or a pipe is written to, and the file that a link points to replaced: the rename would put a file in their
    place, and whoever is root would have no /dev/null any more.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.resolve() if path.is_symlink() and path.is_file() else path
    temporary = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY}")
    try:
        if path.is_char_device() or path.is_fifo():
            with path.open("wb") as device:
                write(device)
            return
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        # A full disk names no file, and nobody knows the temporary one. NumPy says only how much it could write.
        reason = error.strerror or f"not written whole, as on a full disk ({error})"
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def storage_problem(error: BaseException) -> str | None:
    """One line for an OSError about a disk or a path, which names the path; None for every other error."""
    if not isinstance(error, OSError) or error.filename is None:
        return None
    if error.errno not in OF_STORAGE and not _of_mkdir(error):
        return None
    path = Path(str(error.filename)).absolute()
    # The system says only that some directory on the way is none, or that one cannot be made.
    in_the_way = next((place for place in (path, *path.parents) if place.is_symlink() or place.exists()), path)
    if in_the_way.is_symlink() and not in_the_way.exists():
        return f"{in_the_way}: a link to {in_the_way.readlink()}, which is not there"
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and not in_the_way.is_dir():
        return f"{in_the_way}: is a file where a directory is needed; move it away or give another name"
    if error.errno == errno.EISDIR:
        return f"{error.filename}: is a directory where a file is needed; move it away"
    return f"{error.filename}: {error.strerror}"


def _of_mkdir(error: OSError) -> bool:
    """Whether an error was met while a directory was made.

    "No such file" is a mistake of the program's own elsewhere, but the file system's word here for a place where
    nothing can be made, as in /proc.
    """
    return any(frame.f_code.co_name in ("mkdir", "makedirs") for frame, _ in traceback.walk_tb(error.__traceback__))


def locale_problem(error: BaseException) -> str | None:
    """One line for characters that the locale's encoding lacks, in names and files; None for every other error.

    Python reads and writes by the locale unless it is told otherwise, which is UTF-8 nearly everywhere.
    """
    encoding = locale.getpreferredencoding(False)
    if not isinstance(error, UnicodeError) or codecs.lookup(encoding).name == "utf-8":
        return None
    return f"{error}; the encoding of this locale is {encoding}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"


def refuse_existing(path: Path) -> None:
    """UserError where something is there already: nothing that a user made is written over."""
    if path.exists():
        raise UserError(f"{path}: exists already; give another name or delete it")


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` to write into, which becomes `path` at the end; after an error nothing is left of it.

    UserError where `path` exists.
    """
    refuse_existing(path)
    partial = path.with_name(f".{path.name}.partial")  # hidden: a name that a user hardly gives
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()))


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all, in UTF-8.

    The locale C reads names of files as "surrogates", which become the bytes again that they were.
    """
    write_whole(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of one a line; none without the file.

    A line that a kill cut short, or that is just being written, is left out.
    """
    if not path.exists():
        return []
    objects = []
    for line in path.read_text().splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return objects


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with a file's text, in words that go on after its name, and what to do."""
    if error.start == 0 and error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "not UTF-8 text, it begins as UTF-16 does; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"
    before = error.object[max(0, error.start - 20) : error.start].decode(errors="ignore")
    wrong = error.object[error.start]
    return (
        f"not UTF-8 text ({error.reason} {wrong:#x} after {before!r}); convert it: iconv -f ENCODING -t UTF-8 OLD > NEW"
    )


def is_url(name: str) -> bool:
    """Whether a name is one of a store (s3://...) and not of a file here."""
    return SCHEME in name


def file_name(text: str) -> str:
    """`text` as the name of a directory: no slashes, at most LONGEST_NAME bytes.

    The end of a longer one becomes a digest, so that two long names that differ only there stay different.
    """
    name = text.replace("/", "_").encode()
    if len(name) > LONGEST_NAME:
        digest = hashlib.sha256(name).hexdigest()[:8].encode()
        name = name[: LONGEST_NAME - 9] + b"-" + digest
    return name.decode(errors="ignore")  # the cut may have split a character


def by_number(path: Path) -> list[tuple[float, str]]:
    """For sorting: what is a number in a path counts as one, seed=2 comes before seed=10, lr=1e-4 before lr=0.05."""
    parts = re.findall(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?|\D+", str(path))
    return [(float(part), "") if part[0].isdecimal() else (-1.0, part) for part in parts]


def file_entry(path: Path) -> dict[str, Any]:
    """What dataset.json keeps of a file: its SHA-256 and its size in bytes."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def write_below(root: Path, files: Mapping[str, str]) -> None:
    """Write texts by their paths below a directory."""
    for name, text in files.items():
        write_text(root / name, text)

"""Whether the files that texts came from are still the same ones: by content, under whatever name they are given.

An entry is a file {path, name, bytes, modified, sha256}, one of a store {path, name, bytes, version}, or the {name} of
a source that is not made of files (the standard library, a dataset of the hub). Path and time stay in the plan: a
dataset is a function of the texts alone. A store's file is not hashed, which would take as long as reading it: the
store has a version of it (an ETag, mostly a hash of the content).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from job.data.options import Options, flag
from job.data.records import SourceFile
from job.data.remote import RemoteFile, find_one
from job.data.sources import DIRECTORY_SUFFIXES, EMBEDDED, HUGGING_FACE, files_below, find_files, is_of_hub, is_saved
from job.errors import UserError
from job.files import is_url

Entry = dict[str, Any]
LATENTS = ("latents", "unpaired_latents")  # options that name a file of them
# Of a larger file only the beginning is hashed; its size and its time are still compared. Hashing a terabyte would
# take longer than preparing the few texts of it that --max-samples asks for.
HASHED_BYTES = 2**30
NAMED = 3  # files that a line names; it counts the others


def entries(sources: Sequence[str], known: Sequence[Entry] = ()) -> list[Entry]:
    """One entry for every file of the sources, in reading order. UserError where a source is not there.

    Files of the same path, size and time as in `known` are not hashed again.
    """
    of_path = {entry["path"]: entry for entry in known if "path" in entry}
    found: list[Entry] = []
    for source in sources:
        name = source.removeprefix(HUGGING_FACE)
        if source in EMBEDDED:
            found.append({"name": source})
        elif not is_of_hub(source):
            found += [_entry(path, of_path) for path in find_files(source)]
        elif is_saved(name):
            found += [_file_entry(path, of_path) for path in sorted(Path(name).rglob("*.arrow"))]
        elif (directory := Path(name.partition(":")[0])).is_dir():
            # Its README.md may say which ones the library reads.
            found += [_file_entry(path, of_path) for path in files_below(directory) if path.is_file()]
        else:
            found.append({"name": source})
    return found


def left_out(sources: Sequence[str]) -> list[str]:
    """A line for each directory among the sources that says what is not read there, and how to read it.

    Someone who puts a table beside lines of text would else believe that it was read. Of a store only what is read is
    listed.
    """
    local = [source for source in sources if not (source in EMBEDDED or is_url(source) or is_of_hub(source))]
    read = {path.absolute() for source in local for path in find_files(source) if isinstance(path, Path)}
    lines = []
    for source in filter(os.path.isdir, local):
        others = [path for path in files_below(Path(source)) if path.absolute() not in read]
        if others:
            names = ", ".join(str(path.relative_to(source)) for path in others[:NAMED])
            more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
            lines.append(
                f"{source}: left out {names}{more}; of a directory {', '.join(DIRECTORY_SUFFIXES)} are read, "
                f"name other files beside it: {source} {others[0]}"
            )
    return lines


def of_options(options: Options, known: Sequence[Entry] = ()) -> list[Entry]:
    """The entries of all that a preparation reads: sources, unpaired texts, and the files of latents last."""
    found = entries([*options.source, *options.unpaired], known)
    return found + [entry_of(name, getattr(options, name), known) for name in LATENTS if getattr(options, name)]


def entry_of(option: str, name: str, known: Sequence[Entry] = ()) -> Entry:
    """The entry of the one file that an option names. UserError where it is not there."""
    if is_url(name):
        return _entry(find_one(name, flag(option)), {})
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{flag(option)} {path}: no such file")
    return _file_entry(path, {entry["path"]: entry for entry in known if "path" in entry})


def names(options: Options) -> list[str]:
    """All that a preparation reads, as it is named."""
    of_latents = [getattr(options, name) for name in LATENTS]
    return [*options.source, *options.unpaired, *filter(None, of_latents)]


def _entry(path: SourceFile, known: dict[str, Entry]) -> Entry:
    if isinstance(path, RemoteFile):
        return {"path": path.url, "name": path.name, "bytes": path.size, "version": path.version}
    return _file_entry(path, known)


def _file_entry(path: Path, known: dict[str, Entry]) -> Entry:
    entry = _file_state(path)
    before = known.get(entry["path"])
    if before and {**before, "sha256": None} == {**entry, "sha256": None}:
        return before
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            left = HASHED_BYTES
            while left and (block := file.read(min(left, 2**20))):
                digest.update(block)
                left -= len(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return {**entry, "sha256": digest.hexdigest()}


def _file_state(path: Path) -> Entry:
    state = path.stat()
    return {"path": str(path.resolve()), "name": path.name, "bytes": state.st_size, "modified": state.st_mtime_ns}


def refuse_touched(there: Sequence[Entry], sources: Sequence[str]) -> None:
    """UserError for a file that was written while it was read: some texts would be the old ones, some the new.

    The stores among the sources are listed once more, rather than asked for one file after another.
    """
    remote = {str(file): file for source in sources if is_url(source) for file in find_files(source)}
    for entry in there:
        if "version" in entry:
            is_as_it_was = entry["path"] in remote and _entry(remote[entry["path"]], {}) == entry
        else:
            is_as_it_was = "path" not in entry or _is_untouched(entry)
        if not is_as_it_was:
            raise UserError(f"{entry['path']}: changed while it was read; give the same command again")


def _is_untouched(entry: Entry) -> bool:
    return {**entry, "sha256": None} == {**_file_state(Path(entry["path"])), "sha256": None}


def contents(there: Sequence[Entry]) -> list[Entry]:
    """The entries without what differs from one machine to the next."""
    return [{key: value for key, value in entry.items() if key not in ("path", "modified")} for entry in there]


def difference(before: Sequence[Entry], now: Sequence[Entry]) -> str | None:
    """What is not as it was, in words; None if all contents are the same, in the same order."""
    for old, new in zip(before, now, strict=False):
        if ("version" in old) != ("version" in new):
            return f"{new.get('path', new['name'])} is not where {old['name']} was read"
        if _identity(old) != _identity(new):
            same_name = old["name"] == new["name"]
            return f"{new.get('path', new['name'])} " + ("has changed" if same_name else f"is not {old['name']}")
    if len(before) != len(now):
        return f"{len(now)} sources instead of {len(before)}"
    return None


def _identity(entry: Entry) -> tuple[Any, ...]:
    if "sha256" in entry:
        return entry["bytes"], entry["sha256"]
    if "version" in entry:
        return entry["bytes"], entry["version"]
    return (entry["name"],)

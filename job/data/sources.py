"""Where texts come from: Python itself, files, Hugging Face datasets. `read_texts` chooses."""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.console import say
from job.data.optional import import_optional
from job.data.records import (
    BYTE_ORDER_MARK,
    PARQUET,
    SUFFIXES,
    Record,
    SourceFile,
    ending_of,
    kind_of,
    nested_or_null,
    records,
)
from job.data.remote import find_remote
from job.data.stdlib_text import sentences, stdlib_sentences
from job.data.tokenizer import refuse_half_of_pair
from job.data.unicode_names import character_names
from job.errors import UserError
from job.files import is_url

STDLIB = "stdlib"
UNICODE = "unicode"
EMBEDDED = (STDLIB, UNICODE)  # made of the running Python; they come in samples
HUGGING_FACE = "hf:"
# Taken from a directory, compressed ones too. It may also hold a README.md, a dataset_info.json or a metadata.csv,
# which are not meant.
DIRECTORY_SUFFIXES = (".txt", ".jsonl", ".parquet")
DEFAULT_SPLIT = "train"
SAVED_FILES = ("dataset_info.json", "dataset_dict.json")  # what `save_to_disk` of Hugging Face's library writes


def _checked(text: str, where: str) -> str:
    """The text itself. UserError that says `where` it has something that no tokenizer and no file of text takes."""
    if "\0" in text:
        raise UserError(f"{where}: a NUL character (\\u0000), which no text has; is this a binary file? Remove it")
    refuse_half_of_pair(text, where)
    return text


def _value_of(record: object, key: str, where: str, option: str) -> Any:
    """What stands in a record under a key, or UserError that says `where` it is missing."""
    if isinstance(record, dict):
        try:
            return nested_or_null(record, key)
        except KeyError:
            found = f"it has {', '.join(map(str, record))}"
    else:
        found = f"it is a {type(record).__name__}"
    what = "text" if option == "--text-key" else "latent"
    raise UserError(f"{where}: no {what} under the key {key!r}, {found}; name the key with {option}")


def _text_of(record: object, key: str, where: str) -> str | None:
    """The text in a record, None for a null, or UserError that says `where` it is missing."""
    text = _value_of(record, key, where, "--text-key")
    if text is None:
        return None
    if isinstance(text, str):
        return _checked(text, where)
    shown = json.dumps(text, default=str)[:40]
    raise UserError(f"{where}: the value of {key!r} is {shown}, not a text; name the key with --text-key")


def _saved_split(rows: Any, split: str, name: str) -> Any:
    """One split of what `load_from_disk` read: a dictionary of splits, or a single one, which may have no name."""
    if isinstance(rows, dict):
        there = f"it has {', '.join(map(str, rows))}; give one of them with --hf-split"
        chosen = rows.get(split)
    else:
        there = "it was saved as a single one; leave --hf-split out"
        # Only a split that was asked for must be the one that is there.
        chosen = rows if split in (DEFAULT_SPLIT, str(rows.split)) else None
    if chosen is None:
        raise UserError(f"{HUGGING_FACE}{name}: no split {split!r}, {there}")
    return chosen


def _hugging_face(name: str, split: str, keys: Sequence[str]) -> Iterator[Record]:
    """Records of a dataset of the hub or a directory of files (NAME or NAME:CONFIG), or of one of `save_to_disk`.

    They are streamed: read as they are asked for, and never all loaded or written into a cache; what `save_to_disk`
    wrote is mapped into memory.
    """
    rows = iter(_with_columns(_open_hugging_face(name, split), keys))
    for number in itertools.count():
        try:
            row = next(rows, None)
        except Exception as error:  # of a damaged file, or a connection that the library has given up
            raise UserError(f"{HUGGING_FACE}{name} row {number}: cannot be read ({_first_line(error)})") from error
        if row is None:
            return
        yield row, f"{HUGGING_FACE}{name} row {number}"


def _open_hugging_face(name: str, split: str) -> Any:
    """The library's own object for a split. UserError for what it cannot load."""
    datasets = import_optional("datasets", "datasets")
    try:
        if is_saved(name):
            return _saved_split(datasets.load_from_disk(name), split, name)
        path, _, config = name.partition(":")
        return datasets.load_dataset(path, config or None, split=split, streaming=True)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds
        raise UserError(f"{HUGGING_FACE}{name}: cannot be loaded ({_first_line(error)})") from error


def _with_columns(rows: Any, keys: Sequence[str]) -> Any:
    """The rows without the columns that nobody asked for: images and sounds would be decoded.

    All of them where the library does not know the columns yet, and where a key is not there, for the message.
    """
    there = getattr(rows, "column_names", None) or []
    wanted = {key: [column for column in there if key == column or key.startswith(f"{column}.")] for key in keys}
    if not all(wanted.values()):
        return rows
    return rows.select_columns(sorted({column for columns in wanted.values() for column in columns}))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_saved(name: str) -> bool:
    """Whether a name is a directory written by `save_to_disk`."""
    return any((Path(name) / file).is_file() for file in SAVED_FILES)


def _is_of_directory(name: str) -> bool:
    """Whether a directory is read for files of such a name."""
    file = Path(name)
    kind = kind_of(file)
    return kind in DIRECTORY_SUFFIXES and (kind != PARQUET or ending_of(file) == PARQUET)


def is_of_hub(source: str) -> bool:
    """Whether a source is read by Hugging Face's library of datasets; a URL (hf://...) is one of files."""
    return source.startswith(HUGGING_FACE) and not is_url(source)


def files_below(directory: Path) -> list[Path]:
    """Files of a directory and of those in it, sorted; also behind links, and links that lead nowhere.

    Hidden ones are left out: editors and version control keep older copies there.
    """
    files, seen = [], set()
    for place, directories, names in os.walk(directory, followlinks=True):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        real = os.path.realpath(place)
        if real in seen:  # a link to what was walked already, or to a directory that it lies in
            directories.clear()
            continue
        seen.add(real)
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _leads_nowhere(file: Path) -> bool:
    return file.is_symlink() and not file.exists()


def find_files(source: str) -> Sequence[SourceFile]:
    """Files of a path, directory, glob or URL, sorted. UserError if there are none."""
    if is_url(source):
        return find_remote(source, _is_of_directory)
    if not source:
        raise UserError("--source is empty: give a file, a directory or a pattern")
    path = Path(source)
    if path.is_dir():
        files = [file for file in files_below(path) if _is_of_directory(file.name)]
    elif path.is_file():
        files = [path]
    else:
        found = map(Path, glob.glob(source, recursive=True))
        files = [file for file in found if file.is_file() or _leads_nowhere(file)]
        if not files and path.exists():
            raise UserError(f"--source {source}: no regular file; texts are read more than once, so write them to one")
    for file in files:
        if _leads_nowhere(file):
            raise UserError(f"--source {source}: {file} is a link to {file.readlink()}, which is not there")
    if not files and path.is_dir():
        there = [str(file) for file in files_below(path) if kind_of(file) in SUFFIXES]
        named = f"; files of other kinds are read when they are named: --source {there[0]}" if there else ""
        raise UserError(f"--source {source}: no file of {', '.join(DIRECTORY_SUFFIXES)} in this directory{named}")
    if not files:
        raise UserError(f"--source {source}: no such file, and none whose name matches")
    # A directory's own order differs between machines and copies, and the first of two equal texts is the one kept.
    return sorted(files)


@dataclass(frozen=True, slots=True)
class Sample:
    """A record's text and latent, or a text that a source is made of."""

    text: str  # stripped; it may be empty
    where: str
    latent: Any = None  # as it stands in the record


def read_samples(
    sources: Sequence[str], *, text_key: str, hf_split: str, latents_key: str | None = None
) -> Iterator[Sample]:
    """Every line or record of the sources in a fixed order, with an empty text too. UserError for a bad one.

    A text that is null is an empty one. How many a source has of them is told at its end.
    """
    keys = [text_key] if latents_key is None else [text_key, latents_key]
    for source in sources:
        if source in EMBEDDED:
            if latents_key is not None:
                raise UserError(f"--source {source}: has no latents under a key; leave --latents-key out")
            texts = stdlib_sentences() if source == STDLIB else character_names()
            yield from (Sample(text.strip(), source) for text in texts)
            continue
        if is_of_hub(source):
            found = _hugging_face(source.removeprefix(HUGGING_FACE), hf_split, keys)
        else:
            found = (record for path in find_files(source) for record in records(path, keys))
        count = nulls = 0
        for record, where in found:
            text = _text_of(record, text_key, where)
            latent = None if latents_key is None else _value_of(record, latents_key, where, "--latents-key")
            count += 1
            nulls += text is None
            yield Sample((text or "").removeprefix(BYTE_ORDER_MARK).strip(), where, latent)
        if nulls:
            say(f"{source}: {nulls} of {count} records have no {text_key} (null) and give no text")


def read_texts(
    sources: Sequence[str], *, text_key: str, hf_split: str, split_sentences: bool
) -> Generator[str, None, None]:
    """Texts of the sources in a fixed order, stripped, none empty.

    A text is a line of plain text or a record of the other kinds, or with `split_sentences` each of its sentences.
    """
    for source in sources:
        texts: Iterator[str] = (sample.text for sample in read_samples([source], text_key=text_key, hf_split=hf_split))
        if split_sentences and source not in EMBEDDED:
            texts = (sentence for text in texts for sentence in sentences(text))
        yield from filter(None, (text.strip() for text in texts))

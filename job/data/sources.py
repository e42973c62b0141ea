"""Where texts come from: the standard library, files, Hugging Face datasets. `read_texts` chooses."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.data.optional import import_optional
from job.data.stdlib_text import sentences, stdlib_sentences
from job.errors import UserError

STDLIB = "stdlib"
HUGGING_FACE = "hf:"
LINES = (".txt", ".text", ".md")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
SUFFIXES = LINES + JSON_LINES + PARQUET
# Taken from a directory. It may also hold a README.md or a dataset_info.json, which are not meant.
DIRECTORY_SUFFIXES = (".txt", ".jsonl", ".parquet")
BYTE_ORDER_MARK = "\ufeff"
DEFAULT_SPLIT = "train"
SAVED_FILES = ("dataset_info.json", "dataset_dict.json")  # what `save_to_disk` of Hugging Face's library writes


def _checked(text: str, where: str) -> str:
    """The text itself. UserError that says `where` it has something that no tokenizer and no file of text takes."""
    if "\0" in text:
        raise UserError(f"{where}: a NUL character (\\u0000), which no text has; is this a binary file? Remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"{where}: half of a surrogate pair ({found}), which is no character; mend or remove it"
        ) from error
    return text


def _text_of(record: object, key: str, where: str) -> str:
    """The text in a record, or UserError that says `where` it is missing."""
    if not isinstance(record, dict):
        found = f"it is a {type(record).__name__}"
    elif isinstance(record.get(key), str):
        return _checked(record[key], where)
    elif key in record:
        shown = json.dumps(record[key], default=str)[:40]
        raise UserError(f"{where}: the value of {key!r} is {shown}, not a text; name the key with --text-key")
    else:
        found = f"it has {', '.join(map(str, record))}"
    raise UserError(f"{where}: no text under the key {key!r}, {found}; name the key with --text-key")


def _lines(path: Path) -> Iterator[str]:
    """Lines of a file of text, read as they are asked for: --max-samples leaves the rest of a large file unread."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield line.removeprefix(BYTE_ORDER_MARK)  # on any line: files may have been joined
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start} of a block)") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _plain_text(path: Path) -> Iterator[str]:
    """The lines of a file of text."""
    for number, line in enumerate(_lines(path), 1):
        yield _checked(line, f"{path}:{number}")


def _json_lines(path: Path, key: str) -> Iterator[str]:
    """Texts of a file of JSON objects, one a line."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            raise UserError(
                f"{path}:{number}: a JSON array; one object a line is expected "
                f"(jq -c '.[]' {path.name} > lines.jsonl writes it so)"
            )
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); one object a line is expected") from error
        yield _text_of(record, key, f"{path}:{number}")


def _parquet(path: Path, key: str) -> Iterator[str]:
    """Texts of a column of a Parquet file; rows without one are left out."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if key not in columns:
            raise UserError(f"{path}: no column {key!r}, it has {', '.join(columns)}; name the column with --text-key")
        for batch in file.iter_batches(columns=[key]):
            for text in batch.column(0).to_pylist():
                if text is not None:
                    yield _text_of({key: text}, key, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from error


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


def _hugging_face(name: str, key: str, split: str) -> Iterator[str]:
    """A dataset of the hub (NAME or NAME:CONFIG) or a directory written by `save_to_disk`."""
    datasets = import_optional("datasets", "datasets")
    try:
        if is_saved(name):
            rows = _saved_split(datasets.load_from_disk(name), split, name)
        else:
            path, _, config = name.partition(":")
            rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds
        raise UserError(f"{HUGGING_FACE}{name}: cannot be loaded ({str(error).splitlines()[0]})") from error
    for number, row in enumerate(rows):
        yield _text_of(row, key, f"{HUGGING_FACE}{name} row {number}")


def is_saved(name: str) -> bool:
    """Whether a name is a directory written by `save_to_disk`."""
    return any((Path(name) / file).is_file() for file in SAVED_FILES)


def find_files(source: str) -> list[Path]:
    """Files of a path, directory or glob, sorted. UserError if there are none."""
    path = Path(source)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in DIRECTORY_SUFFIXES and file.is_file()]
    elif path.is_file():
        files = [path]
    else:
        files = [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
    if not files and path.is_dir():
        raise UserError(f"--source {source}: no file of {', '.join(DIRECTORY_SUFFIXES)} in this directory")
    if not files:
        raise UserError(f"--source {source}: no such file, and none whose name matches")
    # A directory's own order differs between machines and copies, and the first of two equal texts is the one kept.
    return sorted(files)


def _files(source: str, key: str) -> Iterator[str]:
    """Texts of the files that a path, directory or glob means."""
    for path in find_files(source):
        if path.suffix in PARQUET:
            yield from _parquet(path, key)
        elif path.suffix in JSON_LINES:
            yield from _json_lines(path, key)
        elif path.suffix in LINES:
            yield from _plain_text(path)
        else:
            raise UserError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")


def read_texts(sources: list[str], *, text_key: str, hf_split: str, split_sentences: bool) -> Iterator[str]:
    """Texts of the sources in a fixed order, stripped, none empty.

    A text is a line of plain text or a record of the other kinds, or with `split_sentences` each of its sentences.
    """
    for source in sources:
        if source == STDLIB:
            texts = stdlib_sentences()
        elif source.startswith(HUGGING_FACE):
            texts = _hugging_face(source.removeprefix(HUGGING_FACE), text_key, hf_split)
        else:
            texts = _files(source, text_key)
        if split_sentences and source != STDLIB:  # which comes in sentences
            texts = (sentence for text in texts for sentence in sentences(text))
        yield from filter(None, (text.removeprefix(BYTE_ORDER_MARK).strip() for text in texts))

"""Where texts come from: the standard library, files, Hugging Face datasets. `read_texts` chooses."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path

from job.data.optional import import_optional
from job.data.stdlib_text import sentences, stdlib_sentences
from job.errors import UserError

STDLIB = "stdlib"
HUGGING_FACE = "hf:"
LINES = (".txt", ".text", ".md")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
SUFFIXES = LINES + JSON_LINES + PARQUET


def _text_of(record: object, key: str, where: str) -> str:
    """The text in a record, or UserError that says `where` it is missing."""
    if not isinstance(record, dict):
        found = f"it is a {type(record).__name__}"
    elif isinstance(record.get(key), str):
        return str(record[key])
    else:
        found = f"it has {', '.join(map(str, record))}"
    raise UserError(f"{where}: no text under the key {key!r}, {found}; name the key with --text-key")


def _lines(path: Path) -> Iterator[str]:
    """Lines of a file of text, read as they are asked for: --max-samples leaves the rest of a large file unread."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start} of a block)") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _json_lines(path: Path, key: str) -> Iterator[str]:
    """Texts of a file of JSON objects, one a line."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
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


def _hugging_face(name: str, key: str, split: str) -> Iterator[str]:
    """A dataset of the hub (NAME or NAME:CONFIG) or a directory written by `save_to_disk`."""
    datasets = import_optional("datasets", "datasets")
    saved = any((Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))
    try:
        if saved:
            rows = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, dict) else rows
        else:
            path, _, config = name.partition(":")
            rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds
        raise UserError(f"{HUGGING_FACE}{name}: cannot be loaded ({str(error).splitlines()[0]})") from error
    for number, row in enumerate(rows):
        yield _text_of(row, key, f"{HUGGING_FACE}{name} row {number}")


def find_files(source: str) -> list[Path]:
    """Files of a path, directory or glob, sorted. UserError if there are none."""
    path = Path(source)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
    elif path.is_file():
        files = [path]
    else:
        files = [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
    if not files:
        raise UserError(
            f"--source {source}: no such file, "
            f"and no file with one of the endings {', '.join(SUFFIXES)} under this name"
        )
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
            yield from _lines(path)
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
        yield from filter(None, map(str.strip, texts))

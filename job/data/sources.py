"""Where texts come from: the standard library, files, Hugging Face datasets."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path

from job.data.encoders import optional
from job.data.stdlib_text import sentences, stdlib_sentences
from job.errors import UserError

STDLIB = "stdlib"
HUGGING_FACE = "hf:"
LINES = (".txt", ".text", ".md")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)


def _text_of(record: object, key: str, place: str) -> str:
    """The text in a record, or UserError that says where it is missing."""
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        there = (
            f"it has {', '.join(map(str, record))}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
        )
        raise UserError(f"{place}: no text under the key {key!r}, {there}; name the key with --text-key")
    return str(record[key])


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start} of a block)") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _json_lines(path: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error}); one object a line is expected") from error
            yield _text_of(record, key, f"{path}:{number}")


def _parquet(path: Path, key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if key not in file.schema_arrow.names:
            raise UserError(
                f"{path}: no column {key!r}, it has {', '.join(file.schema_arrow.names)}; name the column with --text-key"
            )
        for batch in file.iter_batches(columns=[key]):
            for text in batch.column(0).to_pylist():
                if text is not None:
                    yield _text_of({key: text}, key, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from error


def _hugging_face(name: str, key: str, split: str) -> Iterator[str]:
    """A dataset of the hub (NAME or NAME:CONFIG) or a directory written by `save_to_disk`."""
    datasets = optional("datasets", "datasets")
    try:
        if Path(name).is_dir() and any(
            (Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")
        ):
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
    suffixes = LINES + JSON_LINES + PARQUET
    path = Path(source)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in suffixes and file.is_file()]
    else:
        files = (
            [path]
            if path.is_file()
            else [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
        )
    if not files:
        raise UserError(
            f"--source {source}: no such file, and no file with one of the endings {', '.join(suffixes)} under this name"
        )
    return sorted(files)


def _files(source: str, key: str) -> Iterator[str]:
    for path in find_files(source):
        if path.suffix in PARQUET:
            yield from _parquet(path, key)
        elif path.suffix in JSON_LINES:
            yield from _json_lines(path, key)
        elif path.suffix in LINES:
            yield from _lines(path)
        else:
            raise UserError(f"{path}: unknown kind of file; give one of {', '.join(LINES + JSON_LINES + PARQUET)}")


def read_texts(sources: list[str], *, text_key: str, hf_split: str, split_sentences: bool) -> Iterator[str]:
    """Texts of the sources in a fixed order, stripped, none empty: a line of plain text, a record of the others, or each of its sentences."""
    for source in sources:
        if source == STDLIB:
            texts = stdlib_sentences()
        elif source.startswith(HUGGING_FACE):
            texts = _hugging_face(source.removeprefix(HUGGING_FACE), text_key, hf_split)
        else:
            texts = _files(source, text_key)
        for text in texts:
            for piece in sentences(text) if split_sentences and source != STDLIB else (text,):
                if stripped := piece.strip():
                    yield stripped

"""Records of files, read as they are asked for: --max-samples leaves the rest of a large file unread.

A record comes with the words that say where it is. It is a dictionary wherever the file is as it should be; what else
stands where a JSON object should is handed on, and named by whoever looks for a text in it (sources.py).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TextIO

from job.data.remote import RemoteFile
from job.errors import UserError
from job.files import not_utf8

LINES = (".txt", ".text", ".md")
JSON = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": csv.excel, ".tsv": csv.excel_tab}
PARQUET = ".parquet"
COMPRESSED = (".gz", ".zst")
SUFFIXES = (*LINES, *JSON, *TABLES, PARQUET)
BYTE_ORDER_MARK = "\ufeff"
# An array is read item by item. Without a limit, one bracket that is missing would bring the whole file into memory.
LONGEST_ITEM = 2**26  # characters
READ_AT_ONCE = 2**16
LONGEST_FIELD = 2**26  # characters of a table's field; the library's own limit is 131,072
WHITE_SPACE = " \t\r\n"

Record = tuple[Any, str]  # and where it is
SourceFile = Path | RemoteFile


def ending_of(path: SourceFile) -> str:
    """The ending of a file's name, that of its compression if it has one."""
    return PurePath(path.name).suffix


def kind_of(path: SourceFile) -> str:
    """The ending that says what is in a file, that of a compressed one left out."""
    name = PurePath(path.name)
    return name.with_suffix("").suffix if name.suffix in COMPRESSED else name.suffix


def nested_or_null(record: dict[str, Any], key: str) -> Any:
    """`nested`, and None where a null stands on the way to what the key names: where a should be for `a.b`."""
    try:
        return nested(record, key)
    except KeyError:
        head, dot, _ = key.rpartition(".")
        if dot and nested_or_null(record, head) is None:
            return None
        raise


def nested(record: dict[str, Any], key: str) -> Any:
    """The value under a key of a record: its own key, or `a.b` for the key b of what is under a. KeyError for none.

    A key that has a dot in it comes first, as it is.
    """
    if key in record:
        return record[key]
    head, dot, tail = key.partition(".")
    while dot:
        if isinstance(inner := record.get(head), dict):
            try:
                return nested(inner, tail)
            except KeyError:
                pass  # the first part of the key may have a dot in it, too
        more, dot, tail = tail.partition(".")
        head = f"{head}.{more}"
    raise KeyError(key)


def records(path: SourceFile, keys: Sequence[str]) -> Iterator[Record]:
    """The records of a file; `keys` are the ones that are wanted, the text's first.

    UserError that names the file, and the record where it has one, for what cannot be read.
    """
    kind = kind_of(path)
    if kind == PARQUET and ending_of(path) == PARQUET:
        yield from _parquet(path, keys)
    elif kind in LINES:
        for number, line in enumerate(_lines(path), 1):
            yield {keys[0]: line}, f"{path}:{number}"
    elif kind in JSON:
        yield from _json_records(path)
    elif kind in TABLES:
        yield from _table(path, kind, keys)
    else:
        raise UserError(
            f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}, "
            f"of text also with {' or '.join(COMPRESSED)} behind"
        )


def _decompressed(file: BinaryIO, ending: str) -> BinaryIO:
    """A file's bytes, decompressed as they are read."""
    if ending == ".gz":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    return file


class _Text:
    """A file of text that is open: a `with` block around all that is read, whose errors name the file."""

    def __init__(self, path: SourceFile, newline: str | None = None) -> None:
        self.path, self.newline = path, newline

    def __enter__(self) -> TextIO:
        try:
            self.stored = self.path.open("rb")
            content = _decompressed(self.stored, ending_of(self.path))
        except OSError as error:
            raise self._problem(error) from error
        self.file = io.TextIOWrapper(content, encoding="utf-8", newline=self.newline)
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        self.file.close()
        self.stored.close()
        if isinstance(error, UnicodeDecodeError | OSError | EOFError | zlib.error):
            raise self._problem(error) from error

    def _problem(self, error: Exception) -> UserError:
        if isinstance(error, UnicodeDecodeError):
            return UserError(f"{self.path}: {not_utf8(error)}")
        if isinstance(error, OSError) and error.strerror:
            return UserError(f"{self.path}: cannot be read ({error.strerror})")
        return UserError(f"{self.path}: cannot be decompressed, damaged or cut off ({error})")


def _lines(path: SourceFile) -> Iterator[str]:
    with _Text(path) as file:
        for line in file:
            yield line.removeprefix(BYTE_ORDER_MARK)  # on any line: files may have been joined


def _json_records(path: SourceFile) -> Iterator[Record]:
    """Of JSON lines, or of one array: whichever the first character says."""
    with _Text(path) as file:
        is_array = _Characters(file).peek() == "["  # a line of it may be the whole file
    if is_array:
        yield from _array(path)
        return
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}:{number}: not JSON ({error}); one object a line, or one array of objects, is expected"
            ) from error
        yield record, f"{path}:{number}"


class _Characters:
    """What of a file's text is not yet used."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = file.read(1).removeprefix(BYTE_ORDER_MARK)
        self.at, self.ended = 0, False

    def more(self, count: int = READ_AT_ONCE) -> None:
        """Read on."""
        block = self.file.read(count)
        self.text, self.at, self.ended = self.text[self.at :] + block, 0, not block

    def peek(self) -> str:
        """The next character that is no white space, not used yet; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in WHITE_SPACE:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self, where: str) -> Any:
        """The next JSON value. UserError where there is none."""
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # else a number may go on
                    self.at = end
                    return value
            except RecursionError as error:
                raise UserError(f"{where}: not JSON ({error})") from error
            except ValueError as error:
                if self.ended or len(self.text) - self.at > LONGEST_ITEM:
                    raise UserError(f"{where}: not JSON, or cut off ({error})") from error
            # Twice as much each time: a long item is then not looked at a thousand times.
            self.more(max(READ_AT_ONCE, len(self.text) - self.at))


def _array(path: SourceFile) -> Iterator[Record]:
    """The items of a JSON array, one after another."""
    with _Text(path) as file:
        characters = _Characters(file)
        characters.peek()
        characters.at += 1  # the bracket, which has been seen
        number = 0
        while characters.peek() != "]" or number:
            number += 1
            where = f"{path} item {number}"
            yield characters.value(where), where
            between = characters.peek()
            if between == "]":
                break
            if between != ",":
                raise UserError(f"{where}: followed by {between or 'the end of the file'!r}, not by a comma or ]")
            characters.at += 1
            characters.peek()
        characters.at += 1
        if left := characters.peek():
            raise UserError(f"{path}: {left!r} behind the end of the array; one array, or one object a line, please")


def _table(path: SourceFile, kind: str, keys: Sequence[str]) -> Iterator[Record]:
    """Rows of a table whose first row names the columns."""
    csv.field_size_limit(LONGEST_FIELD)
    with _Text(path, newline="") as file:
        reader = csv.reader(file, TABLES[kind], strict=True)
        try:
            names = [name.removeprefix(BYTE_ORDER_MARK) for name in next(reader, [])]
            for key in keys:
                if (found := names.count(key)) != 1:
                    columns = f"{found} columns" if found else "no column"
                    raise UserError(
                        f"{path}: {columns} {key!r} in its first row, which has {', '.join(names)}; "
                        f"name the column with {_option(keys, key)}"
                    )
            for row in reader:
                if not row:
                    continue  # an empty line
                where = f"{path}:{reader.line_num}"
                if len(row) != len(names):
                    raise UserError(f"{where}: {len(row)} fields, but the first row names {len(names)} columns")
                yield dict(zip(names, row, strict=True)), where
        except csv.Error as error:
            raise UserError(
                f"{path}:{reader.line_num}: not a {kind[1:]} table ({error}); "
                'a field with quotes in it is written "so, with ""doubled"" quotes"'
            ) from error


def _parquet(path: SourceFile, keys: Sequence[str]) -> Iterator[Record]:
    """Rows of a Parquet file, with the columns that the keys name."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        file = pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else path.open("rb"))
        _refuse_missing_columns(path, file.schema_arrow, keys)
        for batch in file.iter_batches(columns=list(keys), batch_size=READ_AT_ONCE // 16):
            for record in batch.to_pylist():
                row += 1
                yield record, f"{path} row {row}"
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from error


def _option(keys: Sequence[str], key: str) -> str:
    """The option that named a key."""
    return "--text-key" if key == keys[0] else "--latents-key"


def _refuse_missing_columns(path: SourceFile, schema: Any, keys: Sequence[str]) -> None:
    """UserError for a key that is neither a column nor a field of a nested one."""

    def tree(fields: Any) -> dict[str, Any]:
        return {field.name: tree(field.type) if _is_struct(field.type) else None for field in fields}

    columns = tree(schema)
    for key in keys:
        try:
            nested(columns, key)
        except KeyError:
            there = ", ".join(schema.names)
            option = _option(keys, key)
            raise UserError(f"{path}: no column {key!r}, it has {there}; name the column with {option}") from None


def _is_struct(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_struct(kind))

"""Texts in the order of their hashes, rid of duplicates, however many there are: memory holds a few of them at a time.

They lie in a database (DuckDB) that puts into files what its memory does not hold, and sorts it there. It has no file
of its own, which it would lock: file systems of clusters may not know locks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from job.data.console import CountedWork
from job.data.splitting import text_hash
from job.errors import UserError

IN_MEMORY = ":memory:"
MEMORY = "500MB"  # of the database; it takes some 100 MB more than it is told
THREADS = 2  # each takes its share of the memory; sorting is a small part of a preparation
AT_ONCE = 2**15  # rows given to the database, and taken from it, together
CHARACTERS_AT_ONCE = 2**24  # likewise, where texts are long
COLUMNS = pa.schema([("place", pa.uint64()), ("side", pa.uint64()), ("number", pa.int64()), ("text", pa.string())])
# Two texts whose hashes differ only in their first half come in some order, too: the one that is read first, first.
IN_ORDER = "SELECT place, side, number, text FROM texts ORDER BY place, side, number"

T = TypeVar("T")
Numbered = tuple[int, str]  # a text and its number in reading order


@dataclass(frozen=True, slots=True)
class KeptText:
    """A text that stays when its duplicates are dropped: the first of them that was read."""

    digest: bytes  # of job.data.splitting.text_hash
    number: int  # in reading order
    text: str


class TextStore:
    """Takes texts as they are read, and gives them back in order.

    UserError where its directory has no room.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.rows = 0  # texts taken
        self.different = 0  # texts given back
        settings: dict[str, Any] = {
            "memory_limit": MEMORY,
            "threads": THREADS,
            "temp_directory": str(directory),
        }
        self._database = duckdb.connect(IN_MEMORY, config=settings)
        self._database.execute(f"CREATE TABLE texts ({', '.join(_declared(field) for field in COLUMNS)})")

    def __enter__(self) -> TextStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()

    @property
    def duplicates(self) -> int:
        """Texts that were dropped, once all are given back."""
        return self.rows - self.different

    def add(self, texts: Iterable[Numbered], wanted: int | None = None) -> None:
        """Take all of the texts, or read only until there are so many different ones."""
        texts = iter(texts)
        with CountedWork("texts", wanted) as work:
            left = wanted
            # So many more are read as are wanting, which cannot be too many. As long as there are duplicates among
            # them, some are still wanting; the last ones are all different.
            while left is None or left > 0:
                added = self._append(islice(texts, left), work)
                if left is None or added < left:
                    return
                left = (wanted or 0) - self._count_different()

    def _append(self, texts: Iterator[Numbered], work: CountedWork) -> int:
        """Take all of the texts; returns how many they were."""
        before = self.rows
        while rows := list(_batch(texts)):
            places, sides, numbers, stored = zip(*rows, strict=True)
            batch = pa.table([places, sides, numbers, stored], schema=COLUMNS)
            self._run(partial(self._insert, batch))
            self.rows += len(rows)
            work.add(len(rows))
        return self.rows - before

    def _insert(self, batch: pa.Table) -> None:
        self._database.from_arrow(batch).insert_into("texts")

    def _count_different(self) -> int:
        ((count,),) = self._run(
            lambda: self._database.sql("SELECT count(*) FROM (SELECT DISTINCT place, side FROM texts)").fetchall()
        )
        return int(count)

    def in_order(self) -> Iterator[KeptText]:
        """Every different text, in the order of the hashes; to be asked for once."""
        # DuckDB's setting preserve_insertion_order stays on: without it several threads hand the batches of a sorted
        # result over as each finishes one (seen in 2.0.1). So what comes is also looked at.
        batches = iter(self._run(lambda: self._database.sql(IN_ORDER).to_arrow_reader(AT_ONCE)))
        last = (-1, -1, -1)
        while (batch := self._run(lambda: next(batches, None))) is not None:
            places, sides, numbers, texts = (column.to_pylist() for column in batch.columns)
            for place, side, number, text in zip(places, sides, numbers, texts, strict=True):
                here = (place, side, number)
                if here <= last:
                    raise RuntimeError("DuckDB gave the texts out of order; please report it with its version")
                if here[:2] != last[:2]:
                    self.different += 1
                    yield KeptText(side.to_bytes(8, "big") + place.to_bytes(8, "big"), number, text)
                last = here

    def _run(self, step: Callable[[], T]) -> T:
        """What a step of the database returns."""
        try:
            return step()
        except (duckdb.Error, pa.ArrowException) as error:
            problem = str(error).splitlines()[0]
            raise UserError(f"{self.directory}: the texts cannot be sorted here ({problem})") from error


def _declared(field: pa.Field) -> str:
    kinds = {pa.uint64(): "UBIGINT", pa.int64(): "BIGINT", pa.string(): "VARCHAR"}
    return f"{field.name} {kinds[field.type]}"


def _batch(texts: Iterator[Numbered]) -> Iterator[tuple[int, int, int, str]]:
    """The next rows for the database."""
    characters = 0
    for number, text in islice(texts, AT_ONCE):
        digest = text_hash(text)
        characters += len(text)
        yield int.from_bytes(digest[8:], "big"), int.from_bytes(digest[:8], "big"), number, text
        if characters > CHARACTERS_AT_ONCE:
            return

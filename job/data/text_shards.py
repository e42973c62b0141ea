"""The texts of a preparation between its stages: written in shards as they are divided, read again to fit on."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from job.data.given import GivenLatents
from job.data.reading import part_of
from job.data.splitting import PARTS, TRAIN, UNPAIRED, VALIDATION, Division, place, text_hash
from job.data.text_store import KeptText, TextStore
from job.data.work import TextShard, read_json
from job.files import write_json


class PartWriter:
    """Writes the texts of one part, `size` of them a shard, and the latents that were given with them."""

    def __init__(self, work: Path, part: str, size: int, given: GivenLatents | None) -> None:
        self.part = part
        self.count = 0  # texts
        self.shards: list[TextShard] = []
        self._work, self._size, self._given = work, size, given
        self._waiting: list[KeptText] = []

    def add(self, text: KeptText) -> None:
        """Write a text, after those before it."""
        self._waiting.append(text)
        if len(self._waiting) == self._size:
            self.flush()

    def flush(self) -> None:
        """Make a shard of what is not yet in one."""
        if not self._waiting:
            return
        shard = TextShard(self._work, self.part, len(self.shards))
        write_json(shard.texts_file, [kept.text for kept in self._waiting])
        if self._given and self.part != UNPAIRED:
            np.save(shard.latents_file, self._given.pick([kept.number for kept in self._waiting]))
        self.count += len(self._waiting)
        self.shards.append(shard)
        self._waiting = []


class TextShards:
    """All shards of text of a preparation."""

    def __init__(self, store: TextStore, division: Division, work: Path, size: int, given: GivenLatents | None) -> None:
        """Divide and write the texts of the store."""
        writers = {part: PartWriter(work, part, size, given) for part in PARTS}
        for kept in store.in_order():
            writers[part_of(kept, division)].add(kept)
        for writer in writers.values():
            writer.flush()
        self.counts = {part: writer.count for part, writer in writers.items()}
        self.encoded = len(writers[TRAIN].shards)  # of the training split; the ones after them are of texts alone
        self._work = work
        self._of_part = {part: writer.shards for part, writer in writers.items()}

    def to_fit_on(self) -> dict[str, TextsInOrder]:
        """The texts of each split, whether they get a latent or not."""
        return {
            TRAIN: TextsInOrder([self._of_part[TRAIN], self._of_part[UNPAIRED]]),
            VALIDATION: TextsInOrder([self._of_part[VALIDATION]]),
        }

    def number(self) -> dict[str, int]:
        """Put the unpaired texts behind the other training texts; returns how many shards each split has then."""
        for shard in self._of_part[UNPAIRED]:
            shard.texts_file.rename(TextShard(self._work, TRAIN, self.encoded + shard.number).texts_file)
        return {
            TRAIN: self.encoded + len(self._of_part[UNPAIRED]),
            VALIDATION: len(self._of_part[VALIDATION]),
        }


class TextsInOrder:
    """The texts of some parts in the order of their hashes. Every loop reads them anew, a shard at a time."""

    def __init__(self, parts: Sequence[Sequence[TextShard]]) -> None:
        self.parts = [shards for shards in parts if shards]

    def __iter__(self) -> Iterator[str]:
        if len(self.parts) == 1:
            return _texts_of(self.parts[0])
        return heapq.merge(*map(_texts_of, self.parts), key=lambda text: place(text_hash(text)))


def _texts_of(shards: Sequence[TextShard]) -> Iterator[str]:
    for shard in shards:
        yield from read_json(shard.texts_file)

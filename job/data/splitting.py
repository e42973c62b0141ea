"""Which texts are kept, in which split and in which order: a function of their words alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from job.data.console import CountedWork
from job.data.shards import SPLITS


def text_hash(text: str) -> bytes:
    """Hash of a text's words, 16 bytes: texts that differ in case or white space alone are the same text."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()[:16]


@dataclass
class Splits:
    """The texts of a dataset, each list in the order of their hashes."""

    of_split: dict[str, list[str]]
    unpaired: list[str]  # training texts that get no latent
    duplicates: int  # dropped

    @property
    def count(self) -> int:
        """Different texts."""
        return sum(map(len, self.of_split.values())) + len(self.unpaired)

    def to_fit_on(self) -> dict[str, list[str]]:
        """The texts of each split, with or without a latent, in the order of their hashes."""
        train = self.of_split["train"]
        if self.unpaired:
            train = sorted([*train, *self.unpaired], key=lambda text: _place(text_hash(text)))
        return {**self.of_split, "train": train}


def split_texts(
    texts: Iterable[str],
    max_samples: int | None,
    validation_fraction: float,
    encode_fraction: float = 1.0,
    unpaired: Iterable[str] = (),
) -> Splits:
    """Texts of each split, and those of the training split that get no latent.

    The first half of a text's hash decides its split. Drawn by chance or by position instead, a text could change
    sides when texts are added before it, and a model trained on the smaller corpus would be tested on what it has
    seen. Equal texts have one hash, so they never meet across the split.

    The other half decides the order. Sources are sorted by subject, author or length; by hash, any prefix is a random
    sample (evaluations and the encoder's fit take one), and shards are alike.

    The share `encode_fraction` of the training texts gets a latent: by another hash of theirs, so that a larger share
    contains the smaller one. `unpaired` texts never get one, and are left out where they are among the `texts`: one of
    the validation split must not be trained on.
    """
    chosen: dict[bytes, str] = {}
    duplicates = 0
    with CountedWork("texts", max_samples) as work:
        for text in texts:
            digest = text_hash(text)
            if digest in chosen:
                duplicates += 1
                continue
            chosen[digest] = text
            work.add(1)
            if len(chosen) == max_samples:
                break
    validation, encoded = int(validation_fraction * 2**64), int(encode_fraction * 2**64)
    splits = Splits({split: [] for split in SPLITS}, [], duplicates)
    without: dict[bytes, str] = {}
    for digest in sorted(chosen, key=_place):
        if _number(digest[:8]) < validation:
            splits.of_split["validation"].append(chosen[digest])
        elif _number(hashlib.sha256(b"latent" + digest).digest()[:8]) < encoded:
            splits.of_split["train"].append(chosen[digest])
        else:
            without[digest] = chosen[digest]
    for text in unpaired:
        digest = text_hash(text)
        if digest in chosen or digest in without:
            splits.duplicates += 1
        else:
            without[digest] = text
    splits.unpaired = [without[digest] for digest in sorted(without, key=_place)]
    return splits


def _place(digest: bytes) -> bytes:
    return digest[8:]


def _number(eight_bytes: bytes) -> int:
    return int.from_bytes(eight_bytes, "big")

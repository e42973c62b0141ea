"""Which texts are kept, in which split and in which order: a function of their words alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from job.data.console import CountedWork
from job.data.shards import SPLITS


def text_hash(text: str) -> bytes:
    """Hash of a text's words, 16 bytes: texts that differ in case or white space alone are the same text."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()[:16]


def split_texts(
    texts: Iterable[str], max_samples: int | None, validation_fraction: float
) -> tuple[dict[str, list[str]], int]:
    """Texts of each split, in the order of their hashes, and the number of duplicates dropped.

    The first half of a text's hash decides its split. Drawn by chance or by position instead, a text could change
    sides when texts are added before it, and a model trained on the smaller corpus would be tested on what it has
    seen. Equal texts have one hash, so they never meet across the split.

    The other half decides the order. Sources are sorted by subject, author or length; by hash, any prefix is a random
    sample (evaluations and the encoder's fit take one), and shards are alike.
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
    boundary = int(validation_fraction * 2**64)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for digest in sorted(chosen, key=lambda digest: digest[8:]):
        split = "validation" if int.from_bytes(digest[:8], "big") < boundary else "train"
        splits[split].append(chosen[digest])
    return splits, duplicates

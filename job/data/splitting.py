"""Which texts are kept, in which split and in which order: a function of their words alone.

The first half of a text's hash decides its split. Drawn by chance or by position instead, a text could change sides
when texts are added before it, and a model trained on the smaller corpus would be tested on what it has seen. Equal
texts have one hash, so they never meet across the split.

The other half decides the order. Sources are sorted by subject, author or length; by hash, any prefix is a random
sample (evaluations and the encoder's fit take one), and shards are alike.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

TRAIN, VALIDATION = "train", "validation"
UNPAIRED = "unpaired"  # training texts that get no latent
PARTS = (TRAIN, VALIDATION, UNPAIRED)


def text_hash(text: str) -> bytes:
    """Hash of a text's words, 16 bytes: texts that differ in case or white space alone are the same text."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()[:16]


def place(digest: bytes) -> bytes:
    """Where a text with this hash stands among the others."""
    return digest[8:]


@dataclass(frozen=True)
class Division:
    """Which share of the texts goes where.

    The share `encode_fraction` of the training texts gets a latent: by another hash of theirs, so that a larger share
    contains the smaller one.
    """

    validation_fraction: float
    encode_fraction: float = 1.0

    def part(self, digest: bytes) -> str:
        """The part of a text with this hash."""
        if _number(digest[:8]) < int(self.validation_fraction * 2**64):
            return VALIDATION
        # Without a second hash for every text where all of them get one.
        if self.encode_fraction == 1 or self._is_encoded(digest):
            return TRAIN
        return UNPAIRED

    def _is_encoded(self, digest: bytes) -> bool:
        another = hashlib.sha256(b"latent" + digest).digest()
        return _number(another[:8]) < int(self.encode_fraction * 2**64)


def _number(eight_bytes: bytes) -> int:
    return int.from_bytes(eight_bytes, "big")

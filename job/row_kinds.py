"""Kinds of rows: both halves, a text alone, a latent alone; and how many of each make up a batch.

A batch has a fixed number of rows of each kind, at fixed places. So what a step computes has the same shape on every
rank, no micro-batch is without a paired row, and another division of the same batch is still the same batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from job.errors import UserError

PAIRED, TEXT, LATENT = range(3)  # the order in which a dataset has them, and a micro-batch, too
KIND_NAMES = ("paired", "text", "latent")
Counts = tuple[int, int, int]


@dataclass(frozen=True)
class RowKinds:
    """How many rows of each kind a micro-batch and its global batch hold: known before the data is read."""

    counts: Counts  # of the micro-batch
    counts_of_all: Counts  # of the global batch

    @classmethod
    def of(cls, kinds: np.ndarray, positions: np.ndarray) -> RowKinds:
        """Of a micro-batch with the rows at `positions` of a global batch with these `kinds`."""
        return cls(counts_of(kinds[positions]), counts_of(kinds))


def kinds_of_batch(rows: Sequence[int], size: int, unpaired_share: float | None) -> np.ndarray:
    """Kinds, int64 [size], of the places of a global batch for data with so many `rows` of each kind.

    `unpaired_share` is the share of rows that lack a half; None: as in the data. Every kind that is wanted gets a row
    at least. Places of a kind are spread evenly.
    """
    counts = _counts_of_batch(rows, size, unpaired_share)
    # The j-th of n rows of a kind would best stand at (j + 1/2) / n of the batch.
    wanted = [((2 * place + 1) / (2 * count), kind) for kind, count in enumerate(counts) for place in range(count)]
    return np.array([kind for _, kind in sorted(wanted)], np.int64)


def _counts_of_batch(rows: Sequence[int], size: int, unpaired_share: float | None) -> list[int]:
    unpaired = sum(rows[TEXT:])
    if unpaired == 0 or unpaired_share == 0:
        return [size, 0, 0]
    share = unpaired / sum(rows) if unpaired_share is None else unpaired_share
    shares = [1 - share, *(share * of_kind / unpaired for of_kind in rows[TEXT:])]
    wanted = [kind for kind in (PAIRED, TEXT, LATENT) if rows[kind]]
    if size < len(wanted):
        names = ", ".join(KIND_NAMES[kind] for kind in wanted)
        raise UserError(
            f"a global batch of {size} cannot hold a row of each kind ({names}); raise training.train_batch_size"
        )
    counts = [max(1, round(size * shares[kind])) if kind in wanted else 0 for kind in (PAIRED, TEXT, LATENT)]
    while sum(counts) != size:  # rounding; the largest count is changed least by it
        counts[int(np.argmax(counts))] += 1 if sum(counts) < size else -1
    return counts


def counts_of(kinds: np.ndarray) -> Counts:
    """How many rows of each kind there are among `kinds`."""
    paired, text, latent = np.bincount(kinds, minlength=len(KIND_NAMES)).tolist()
    return paired, text, latent


def refuse_missing_kinds(kinds: np.ndarray, batch_size: int) -> None:
    """UserError when a micro-batch of batch_size rows has none of a kind that the global batch has.

    Ranks would then differ in the passes that they make, while those of sharded weights must be made together.
    """
    there = np.unique(kinds).tolist()
    for start in range(0, len(kinds), batch_size):
        counts = counts_of(kinds[start : start + batch_size])
        for kind in there:
            if not counts[kind]:
                of_all = counts_of(kinds)[kind]
                raise UserError(
                    f"of {len(kinds)} rows of a global batch {of_all} are of the kind {KIND_NAMES[kind]}, so that a "
                    f"micro-batch of training.train_batch_size={batch_size} would have none; raise it, or set another "
                    "data.unpaired_per_batch"
                )

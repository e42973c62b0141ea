"""The order of training samples: a pure function of (seed, step), for any number of ranks.

So there is no state to store and nothing to replay on a resume. The stream of samples is epoch after epoch; position p
holds `permutation_epoch(p % N)` with epoch = p // N. A permutation is a keyed Feistel network with cycle walking (Black
& Rogaway 2002), so that looking up a batch costs the batch, whatever N is; a shuffled list would cost N every epoch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from job.errors import UserError
from job.row_kinds import PAIRED, Counts, counts_of

ROUNDS = 8
WINDOW_BATCHES = 64  # length bucketing sorts inside this many global batches


class HasLengths(Protocol):
    """What length bucketing needs of a dataset."""

    def lengths(self, indices: np.ndarray) -> np.ndarray: ...


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Images, int64, of `positions` (each in [0, size)) under the permutation of [0, size) of (seed, epoch)."""
    keys = np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest(), "<u8")
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = np.asarray(positions).astype(np.uint64)
    walking = np.arange(len(values))  # images outside [0, size) are mapped again until they are inside
    while len(walking):
        left, right = values[walking] >> half, values[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[walking] = (left << half) | right
        walking = walking[values[walking] >= np.uint64(size)]
    return values.astype(np.int64)


class Sampler:
    """Dataset indices of every global batch. Its whole state is the step."""

    kinds: np.ndarray | None = None  # of the rows of a batch; None: all are paired

    def __init__(
        self, dataset: HasLengths, num_samples: int, global_batch_size: int, seed: int, length_bucketing: bool = False
    ) -> None:
        if num_samples < 1:
            raise UserError("the training split is empty; prepare more texts")
        self.dataset, self.num_samples, self.global_batch_size, self.seed = (
            dataset,
            num_samples,
            global_batch_size,
            seed,
        )
        self.length_bucketing = length_bucketing
        self._window: tuple[int, np.ndarray] | None = None  # the last window looked at: neighbouring steps share it

    def _stream(self, start: int, stop: int) -> np.ndarray:
        """Dataset indices at these positions of the stream."""
        pieces = []
        while start < stop:
            epoch, place = divmod(start, self.num_samples)
            count = min(stop - start, self.num_samples - place)
            pieces.append(permute(np.arange(place, place + count), self.num_samples, self.seed, epoch))
            start += count
        return np.concatenate(pieces)

    def _bucketed(self, window: int) -> np.ndarray:
        """The batches of a window, [WINDOW_BATCHES, global_batch_size].

        Its stretch of the stream is sorted by length and cut into batches, and these are shuffled.
        """
        size = WINDOW_BATCHES * self.global_batch_size
        indices = self._stream(window * size, (window + 1) * size)
        by_length = indices[np.argsort(self.dataset.lengths(indices), kind="stable")].reshape(WINDOW_BATCHES, -1)
        return by_length[np.random.default_rng([self.seed, window]).permutation(WINDOW_BATCHES)]

    def batch(self, step: int) -> np.ndarray:
        """Dataset indices of 0-based optimizer step `step`, int64 [global_batch_size]."""
        if not self.length_bucketing:
            return self._stream(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        window, place = divmod(step, WINDOW_BATCHES)
        if self._window is None or self._window[0] != window:
            self._window = (window, self._bucketed(window))
        return self._window[1][place]

    def epoch(self, step: int) -> float:
        """Epochs completed before this step: samples seen / num_samples."""
        return step * self.global_batch_size / self.num_samples


class MixedSampler:
    """Batches of data with several kinds of rows: every kind has its places in the batch, and an order of its own."""

    def __init__(
        self, dataset: HasLengths, rows: Counts, kinds: np.ndarray, seed: int, length_bucketing: bool = False
    ) -> None:
        """The dataset has so many `rows` of each kind, one kind after the other; `kinds` [G] are those of a batch."""
        self.kinds, self.global_batch_size = kinds, len(kinds)
        self._first = np.concatenate([[0], np.cumsum(rows)])
        self._of_kind = {
            kind: Sampler(_From(dataset, self._first[kind]), rows[kind], count, seed, length_bucketing)
            for kind, count in enumerate(counts_of(kinds))
            if count
        }

    def batch(self, step: int) -> np.ndarray:
        """Dataset indices of 0-based optimizer step `step`, int64 [global_batch_size]."""
        indices = np.empty(self.global_batch_size, np.int64)
        for kind, sampler in self._of_kind.items():
            indices[self.kinds == kind] = self._first[kind] + sampler.batch(step)
        return indices

    def epoch(self, step: int) -> float:
        """Epochs of the paired rows completed before this step."""
        return self._of_kind[PAIRED].epoch(step)


@dataclass(frozen=True)
class _From:
    """A dataset from some row on."""

    dataset: HasLengths
    first: int

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.dataset.lengths(indices + self.first)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.sampler import WINDOW_BATCHES, Sampler, permute
from job.data.synthetic import SyntheticDataset
from job.errors import UserError


class Lengths:
    """Lengths that look random but are a function of the index."""

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return (np.asarray(indices) * 7919) % 97 + 1


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_permutation_hits_every_sample_once(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


def test_permutation_is_the_one_that_checkpoints_rely_on() -> None:
    assert permute(np.arange(10), 10, 42, 0).tolist() == [5, 3, 9, 4, 2, 7, 0, 8, 6, 1]
    assert permute(np.array([0, 10**12]), 10**12 + 1, 42, 3).tolist() == [281250685045, 300763940219]


def test_permutations_look_random() -> None:
    size = 5000
    first, second = permute(np.arange(size), size, 0, 0), permute(np.arange(size), size, 0, 1)
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert (first == second).mean() < 0.01


@given(num_samples=st.integers(1, 300), batch_size=st.integers(1, 70), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_every_epoch_is_complete_and_nothing_is_dropped_between_epochs(
    num_samples: int, batch_size: int, seed: int
) -> None:
    sampler = Sampler(Lengths(), num_samples, batch_size, seed)
    steps = -(-3 * num_samples // batch_size)
    stream = np.concatenate([sampler.batch(step) for step in range(steps)])
    for epoch in range(3):
        assert np.array_equal(np.sort(stream[epoch * num_samples : (epoch + 1) * num_samples]), np.arange(num_samples))


def test_bucketing_keeps_the_samples_of_a_window_and_narrows_batches() -> None:
    plain, bucketed = (Sampler(Lengths(), 5000, 16, 1, length_bucketing=bucketing) for bucketing in (False, True))
    steps = range(WINDOW_BATCHES, 2 * WINDOW_BATCHES)
    rows, narrow = (np.stack([sampler.batch(step) for step in steps]) for sampler in (plain, bucketed))
    assert np.array_equal(np.sort(rows.ravel()), np.sort(narrow.ravel()))
    spreads = [np.ptp(Lengths().lengths(table), axis=1).mean() for table in (rows, narrow)]
    assert spreads[1] < 0.1 * spreads[0]
    longest = Lengths().lengths(narrow).max(axis=1)
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.4  # batches do not come sorted


@pytest.mark.parametrize("bucketing", [False, True])
def test_a_batch_depends_on_the_step_alone(bucketing: bool) -> None:
    walked = Sampler(Lengths(), 1000, 24, 5, length_bucketing=bucketing)
    batches = [walked.batch(step) for step in range(150)]
    for step in (149, 3, 77):
        assert np.array_equal(Sampler(Lengths(), 1000, 24, 5, length_bucketing=bucketing).batch(step), batches[step])
    assert not np.array_equal(Sampler(Lengths(), 1000, 24, 6, length_bucketing=bucketing).batch(0), batches[0])


def test_epoch_counts_samples() -> None:
    assert Sampler(Lengths(), 100, 30, 0).epoch(10) == 3.0


def test_empty_split_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        Sampler(Lengths(), 0, 8, 0)


def test_synthetic_samples_are_reproducible_and_tell_their_words() -> None:
    train, again = SyntheticDataset(40, 64, 16, 24, 3, "train"), SyntheticDataset(40, 64, 16, 24, 3, "train")
    validation = SyntheticDataset(40, 64, 16, 24, 3, "validation")
    indices = range(40)
    assert train.lengths(np.arange(40)).tolist() == [len(train[index][0]) for index in indices]
    assert all(np.array_equal(a, b) for index in indices for a, b in zip(train[index], again[index], strict=True))
    assert not np.array_equal(train[0][0], validation[0][0])
    latents = np.stack([train[index][1] for index in indices])
    words = np.stack([np.bincount(train[index][0], minlength=64) / len(train[index][0]) for index in indices])
    scores = (latents @ train.projection.T)[:, 2:]
    assert (
        np.mean([words[index, 2 + np.argmax(scores[index])] > 0 for index in indices]) > 0.7
    )  # the words closest to a latent are in its text

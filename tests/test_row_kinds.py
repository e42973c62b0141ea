"""How many rows of each kind a batch has, and where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.errors import UserError
from job.row_kinds import counts_of, kinds_of_batch, refuse_missing_kinds


@given(
    st.tuples(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**6)),
    st.sampled_from([8, 32, 64, 96]),
    st.one_of(st.none(), st.floats(0.01, 0.99)),
)
def test_a_batch_has_its_share_of_every_kind_spread_evenly(
    rows: tuple[int, int, int], size: int, share: float | None
) -> None:
    kinds = kinds_of_batch(rows, size, share)
    assert len(kinds) == size
    counts = counts_of(kinds)
    unpaired = sum(rows[1:])
    wanted = 0 if not unpaired else unpaired / sum(rows) if share is None else share
    assert all((count > 0) == (there > 0) for count, there in zip(counts, rows, strict=True))
    assert abs(sum(counts[1:]) - size * wanted) <= 2
    for half in (kinds[: size // 2], kinds[size // 2 :]):
        assert all(abs(2 * of_half - of_all) <= 2 for of_half, of_all in zip(counts_of(half), counts, strict=True))


def test_a_micro_batch_without_a_kind_is_refused() -> None:
    kinds = kinds_of_batch((30, 970, 0), 64, None)
    assert counts_of(kinds) == (2, 62, 0)
    refuse_missing_kinds(kinds, 32)
    with pytest.raises(UserError, match=r"2 are of the kind paired, .*train_batch_size=16 would have none"):
        refuse_missing_kinds(kinds, 16)
    with pytest.raises(UserError, match="a global batch of 2 cannot hold"):
        kinds_of_batch((1, 1, 1), 2, None)
    assert counts_of(kinds_of_batch((30, 970, 0), 64, 0)) == (64, 0, 0)
    assert counts_of(np.array([2, 2, 0])) == (1, 0, 2)

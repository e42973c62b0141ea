"""The leaner SVD against the library's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from job.data.truncated_svd import truncated_svd


@pytest.mark.parametrize("shape", [(900, 300), (200, 700)], ids=["more texts than words", "more words than texts"])
def test_its_bits_are_those_of_scikit_learn(shape: tuple[int, int]) -> None:
    matrix = sparse.random_array(shape, density=0.05, format="csr", rng=np.random.default_rng(0))
    before = matrix.toarray()
    vectors, variance = truncated_svd(matrix, 12, seed=5)
    library = TruncatedSVD(12, random_state=5).fit(matrix)
    assert np.array_equal(vectors, library.components_.T)
    assert variance == float(library.explained_variance_ratio_.sum())
    assert np.array_equal(matrix.toarray(), before)

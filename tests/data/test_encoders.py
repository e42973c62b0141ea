"""Encoders of texts, and the libraries that only some of them need."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from job.data.encoders import LsaEncoder
from job.data.optional import import_optional
from job.errors import UserError


def test_lsa_is_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{number}" for number in rng.zipf(1.3, size=12) % 4000) for _ in range(4000)]
    latents = []
    for threads in (2, 1):
        with threadpool_limits(threads):
            encoder = LsaEncoder.fit(texts, 64, seed=1)
            with (tmp_path / "encoder").open("wb") as file:
                encoder.save(file)
            latents.append(LsaEncoder.load(tmp_path / "encoder").encode(texts))
            # A shard's latents do not depend on what else is encoded with it.
            assert np.array_equal(latents[-1][700:703], encoder.encode(texts[700:703]))
    assert np.array_equal(latents[0], latents[1])
    assert latents[0].dtype == np.float32


def test_a_missing_library_names_the_command() -> None:
    assert importlib.util.find_spec("no_such_library") is None
    with pytest.raises(UserError, match="pip install no-such-library"):
        import_optional("no_such_library", "no-such-library")

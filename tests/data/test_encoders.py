"""Encoders of texts, and the libraries that only some of them need."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from job.data.description import encoder_words
from job.data.encoders import (
    ENCODER_FILE,
    LETTERS,
    WORDS,
    LsaEncoder,
    Resources,
    SentenceTransformersEncoder,
    load_encoder,
)
from job.data.optional import import_optional
from job.data.shards import ShardDataset
from job.data.tokenizer import of_dataset
from job.errors import UserError


def test_lsa_is_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{number}" for number in rng.zipf(1.3, size=12) % 4000) for _ in range(4000)]
    latents = []
    for threads in (2, 1):
        with threadpool_limits(threads):
            encoder = LsaEncoder.fit(texts, 64, seed=1)
            encoder.save(tmp_path / ENCODER_FILE)
            latents.append(load_encoder(tmp_path, encoder.description).encode(texts))
            # A shard's latents do not depend on what else is encoded with it.
            assert np.array_equal(latents[-1][700:703], encoder.encode(texts[700:703]))
    assert np.array_equal(latents[0], latents[1])
    assert latents[0].dtype == np.float32


def test_a_missing_library_names_the_command() -> None:
    assert importlib.util.find_spec("no_such_library") is None
    with pytest.raises(UserError, match="pip install no-such-library"):
        import_optional("no_such_library", "no-such-library")


def test_the_encoder_of_a_dataset_makes_its_latents(prepared: Path) -> None:
    dataset = ShardDataset(prepared, "validation")
    tokenizer = of_dataset(prepared, dataset.info)
    assert tokenizer
    texts = [tokenizer.decode(dataset[index][0]) for index in range(len(dataset))]
    encoder = load_encoder(prepared, dataset.info.encoder)
    assert np.array_equal(encoder.encode(texts), np.stack([dataset[index][1] for index in range(len(dataset))]))
    assert encoder.description == dataset.info.encoder
    assert ENCODER_FILE in dataset.info.files
    assert not encoder.encode(["?!"]).any()


def test_another_encoder_or_a_damaged_one_is_refused(prepared: Path, tmp_path: Path) -> None:
    description = ShardDataset(prepared, "train").info.encoder
    content = (prepared / ENCODER_FILE).read_bytes()
    for changed, message in (
        (content[:-1] + bytes([content[-1] ^ 1]), "not the encoder that made the latents"),
        (content[:500], "damaged or no fitted encoder"),
        (b"", "damaged or no fitted encoder"),
    ):
        (tmp_path / ENCODER_FILE).write_bytes(changed)
        with pytest.raises(UserError, match=message):
            load_encoder(tmp_path, description)
    with pytest.raises(UserError, match=r"encoder\.safetensors: missing"):
        load_encoder(tmp_path / "nowhere", description)
    with pytest.raises(UserError, match=r"were not made by prepare \(lgdlm\)"):
        load_encoder(prepared, {"name": "lgdlm"})


class Model(torch.nn.Linear):
    """Stands in for a sentence-transformers model of five dimensions."""

    scale = 1.0

    def __init__(self, name: str, truncate_dim: int | None, **options: Any) -> None:
        super().__init__(1, 5, bias=False)
        torch.nn.init.constant_(self.weight, self.scale)
        self.truncate_dim = truncate_dim

    def encode(
        self, texts: list[str], *, prompt: str | None, normalize_embeddings: bool, **options: Any
    ) -> torch.Tensor:
        lengths = torch.tensor([[float(len((prompt or "") + text))] for text in texts])
        latents = self(lengths).detach()[:, : self.truncate_dim]
        return torch.nn.functional.normalize(latents) if normalize_embeddings else latents


def test_a_model_is_known_by_its_weights_and_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    with pytest.raises(UserError, match="--truncate-dim 6: name has only 5 dimensions"):
        SentenceTransformersEncoder("name", 6, "float32", Resources())
    three = SentenceTransformersEncoder("name", 3, "float32", Resources()).description
    loaded = load_encoder(Path("nowhere"), three)
    assert loaded.encode(["four", "a"]).tolist() == [[4.0] * 3, [1.0] * 3]
    assert loaded.encode([]).shape == (0, 3)
    assert loaded.description == three
    assert SentenceTransformersEncoder("name", 5, "float32", Resources()).description["sha256"] != three["sha256"]
    monkeypatch.setattr(Model, "scale", 2.0)
    with pytest.raises(UserError, match="name: not the encoder that made the latents"):
        load_encoder(Path("nowhere"), three)


def test_a_prompt_and_a_length_belong_to_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    plain = SentenceTransformersEncoder("name", 4, "float32", Resources())
    prompted = SentenceTransformersEncoder("name", 4, "float32", Resources(), prompt="query: ")
    unit = SentenceTransformersEncoder("name", 4, "float32", Resources(), normalize=True)
    assert prompted.encode(["four"]).tolist() == [[11.0] * 4]
    assert unit.encode(["four"]).tolist() == [[0.5] * 4]
    hashes = {encoder.description["sha256"] for encoder in (plain, prompted, unit)}
    assert len(hashes) == 3
    assert not {"prompt", "normalize"} & plain.description.keys()  # as in data from before there were these
    for encoder in (prompted, unit):
        again = load_encoder(Path("nowhere"), encoder.description)
        assert again.encode(["four"]).tolist() == encoder.encode(["four"]).tolist()
    assert "prompt query: , normalize True" in encoder_words({"prompt": "query: ", "normalize": True})


def test_letters_know_the_spelling_of_a_word_that_was_never_seen(tmp_path: Path) -> None:
    texts = [f"the {name} sign" for name in ("alpha", "alphabet", "beta", "gamma", "gammadion", "delta")]
    words, letters = (LsaEncoder.fit(texts, 4, seed=0, features=features) for features in (WORDS, LETTERS))
    unseen, near, far = "alphas", "alpha", "delta"
    assert not words.encode([unseen]).any()
    latents = letters.encode([unseen, near, far])
    unit = latents / np.linalg.norm(latents, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2]
    letters.save(tmp_path / "encoder.safetensors")
    again = LsaEncoder.load(tmp_path / "encoder.safetensors", letters.description)
    np.testing.assert_array_equal(again.encode(texts), letters.encode(texts))
    assert "features" not in words.description  # as in data from before there was a choice

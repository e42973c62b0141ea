from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from job.data.description import (
    DESCRIPTION_FILE,
    describe_dataset,
    description_of,
    find_tokenizer,
    from_values,
    read_description,
    refuse_other_data,
    same_encoder,
    to_values,
    with_model_of,
    write_model_files,
)
from job.data.lengths import fit_lengths, predicted_lengths
from job.data.shards import DatasetInfo, ShardDataset, read_info
from job.errors import UserError

NAMES = ("MODEL", "DATA")
HASH = "0" * 64


@pytest.fixture(scope="module")
def info(prepared: Path) -> DatasetInfo:
    return read_info(prepared)


def test_a_description_comes_back_with_its_files(prepared: Path, tmp_path: Path) -> None:
    description = describe_dataset(ShardDataset(prepared, "train"), standardize=True)
    write_model_files(tmp_path / "model", description, [tmp_path, prepared])
    assert read_description(tmp_path / "model") == description
    tokenizer = find_tokenizer(description, [tmp_path, tmp_path / "model"])
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode(["A thread opens a file."])[0]) == "A thread opens a file."
    (tmp_path / "model" / "tokenizer.json").write_text("{}")  # another one is not taken for it
    assert find_tokenizer(description, [tmp_path / "model"]) is None
    with pytest.raises(UserError, match=r"tokenizer\.json: not found in .*, or changed since"):
        write_model_files(tmp_path / "other", description, [tmp_path / "model"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 9}, "format_version 9"),
        ({"colour": "blue"}, "damaged"),
    ],
)
def test_a_description_of_another_kind_is_refused(change: dict[str, object], words: str, prepared: Path) -> None:
    values = to_values(describe_dataset(ShardDataset(prepared, "train"), standardize=True)) | change
    with pytest.raises(UserError, match=rf"here: .*{words}"):
        from_values(values, Path("here"))


def test_description_of_finds_it_in_runs_checkpoints_exports_and_data(prepared: Path, tmp_path: Path) -> None:
    description = describe_dataset(ShardDataset(prepared, "train"), standardize=True)
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    with pytest.raises(UserError, match="no run, exported model or prepared dataset that carries its tokenizer"):
        description_of(run)
    write_model_files(run / "model", description, [prepared])
    write_model_files(tmp_path / "export", description, [prepared])
    assert description_of(run) == run / "model"
    assert description_of(run / "checkpoints" / "step_00000004") == run / "model"
    assert description_of(tmp_path / "export") == tmp_path / "export"
    assert description_of(prepared) == prepared
    with pytest.raises(UserError, match="no such directory"):
        description_of(tmp_path / "nowhere")
    (run / "model" / DESCRIPTION_FILE).write_text(json.dumps(to_values(description))[:50])
    with pytest.raises(UserError, match=r"model\.json: cannot be read, or damaged"):
        read_description(run / "model")


def test_its_own_data_passes_without_a_note(prepared: Path, info: DatasetInfo) -> None:
    description = describe_dataset(ShardDataset(prepared, "train"), standardize=True)
    assert refuse_other_data(description, info, NAMES) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_dim": 9}, "latents of 9 dimensions in DATA do not fit MODEL, which has 8"),
        ({"files": {"tokenizer.json": {"sha256": HASH, "bytes": 5}}}, "tokens of DATA are of another tokenizer .*000"),
        ({"tokenizer": None, "vocab_size": 301}, "vocabulary of 301 .* in DATA does not fit MODEL"),
        ({"tokenizer": None, "mask_token_id": 7}, "mask token 7 in DATA does not fit MODEL"),
        ({"encoder": {"name": "sentence_transformers", "model": "m"}}, "another encoder .*sentence_transformers.*lsa"),
        ({"encoder": {"name": "lsa", "sha256": HASH}}, "another encoder .*sha256 000000000000"),
    ],
)
def test_other_data_is_refused_naming_both(
    change: dict[str, object], words: str, prepared: Path, info: DatasetInfo
) -> None:
    description = describe_dataset(ShardDataset(prepared, "train"), standardize=True)
    own = dataclasses.replace(description, encoder=description.encoder | {"sha256": "1" * 64})
    other = dataclasses.replace(info, **change)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=words):
        refuse_other_data(own, other, NAMES)


def test_other_statistics_are_a_note_and_the_models_are_kept(prepared: Path, info: DatasetInfo) -> None:
    description = describe_dataset(ShardDataset(prepared, "train"), standardize=True)
    moved = (np.array(info.latent_mean) + 0.5 * np.array(info.latent_std)).tolist()
    other = dataclasses.replace(info, latent_mean=moved)
    (note,) = refuse_other_data(description, other, NAMES)
    assert "means differ by up to 0.5 standard deviations" in note
    assert "standardized with those of MODEL" in note
    assert refuse_other_data(dataclasses.replace(description, standardize=False), other, NAMES) == []
    kept = with_model_of(dataclasses.replace(description, latent_mean=moved, max_length=5), description)
    assert (kept.latent_mean, kept.max_length) == (info.latent_mean, 5)


def test_an_encoder_is_known_by_its_hash_or_by_what_both_say() -> None:
    fitted = {"name": "lsa", "vocabulary": 9, "explained_variance": 0.5}
    assert same_encoder(fitted, fitted | {"sha256": HASH})  # data from before encoders had hashes
    assert not same_encoder(fitted, fitted | {"explained_variance": 0.4})
    assert same_encoder({"name": "m", "model": "here", "sha256": HASH}, {"name": "m", "model": "there", "sha256": HASH})
    assert not same_encoder(fitted | {"sha256": HASH}, fitted | {"sha256": "1" * 64})


def test_likely_lengths_follow_the_latents() -> None:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((500, 4)) * 3 + 7
    latents[:, 3] = 2.0  # a constant dimension
    lengths = np.exp(2 + 0.1 * (latents[:, 0] - 7)).round().astype(np.int64)
    latents[5] = np.nan
    weights = fit_lengths(latents, lengths)
    found = predicted_lengths(weights, np.delete(latents, 5, 0), 48)
    assert np.abs(found - np.delete(lengths, 5)).mean() < 0.6
    assert predicted_lengths(weights, np.array([[1e9, 0, 0, 0], [-1e9, 0, 0, 0]]), 48).tolist() == [48, 1]
    assert fit_lengths(latents[5:6], lengths[5:6]) == []

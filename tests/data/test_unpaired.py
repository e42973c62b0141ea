"""Data with texts that have no latent and latents that have no text: prepared, read, and trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from job.data.loader import BatchFormat, BatchSplit, LatentScale, Loader
from job.data.sampler import MixedSampler
from job.data.shards import ShardDataset
from job.prepare import main
from job.row_kinds import LATENT, PAIRED, TEXT, RowKinds, kinds_of_batch

ANIMALS = ("cat", "dog", "horse", "cow", "hen")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 texts of which a third has a latent, 40 more without, 25 latents without a text."""
    directory = tmp_path_factory.mktemp("unpaired")
    texts = [f"the {ANIMALS[n % 5]} number {n} sees {n // 5} of them" for n in range(300)]
    (directory / "texts.txt").write_text("\n".join(texts))
    more = [f"a {ANIMALS[n % 5]} without number {n}" for n in range(40)]
    (directory / "more.txt").write_text("\n".join([*more, *texts[:10]]))
    np.save(directory / "latents.npy", np.random.default_rng(0).standard_normal((25, 8)))
    arguments = ["--source", str(directory / "texts.txt"), "--unpaired", str(directory / "more.txt")]
    arguments += ["--unpaired-latents", str(directory / "latents.npy"), "--encode-fraction", "0.3"]
    arguments += ["--latent-dim", "8", "--vocab-size", "300", "--shard-size", "64", "--validation-fraction", "0.1"]
    assert main([*arguments, "--out", str(directory / "data")]) == 0
    return directory


def test_rows_come_in_the_order_of_their_kinds(prepared: Path) -> None:
    data = ShardDataset(prepared / "data", "train", verify_hashes=True)
    paired, texts, latents = data.info.rows_of_kinds("train")
    assert data.info.unpaired == {"text": texts, "latent": latents}
    assert latents == 25
    assert paired + texts + data.info.counts["validation"] == 340
    assert 0.2 < paired / (paired + texts - 40) < 0.4
    rows = [data[index] for index in range(len(data))]
    without_latent = [bool(np.isnan(latent).all()) for _, latent in rows]
    without_text = [bool((tokens == data.info.mask_token_id).all()) for tokens, _ in rows]
    assert without_latent == [False] * paired + [True] * texts + [False] * latents
    assert without_text == [False] * (paired + texts) + [True] * latents
    np.testing.assert_array_equal(
        np.stack([latent for _, latent in rows[-25:]]), np.load(prepared / "latents.npy").astype(np.float32)
    )
    assert [len(tokens) for tokens, _ in rows] == data.lengths(np.arange(len(data))).tolist()
    validation = ShardDataset(prepared / "data", "validation")
    assert all(np.isfinite(validation[index][1]).all() for index in range(len(validation)))


def test_statistics_are_of_the_rows_with_both_halves(prepared: Path) -> None:
    data = ShardDataset(prepared / "data", "train")
    paired = data.info.rows_of_kinds("train")[PAIRED]
    latents = np.stack([data[index][1] for index in range(paired)]).astype(np.float64)
    np.testing.assert_allclose(data.info.latent_mean, latents.mean(0), atol=1e-6)
    np.testing.assert_allclose(data.info.latent_std, latents.std(0), rtol=1e-5)


@pytest.mark.parametrize("bucketing", [False, True])
def test_the_loader_gives_every_rank_its_kinds(prepared: Path, bucketing: bool) -> None:
    data = ShardDataset(prepared / "data", "train")
    rows = data.info.rows_of_kinds("train")
    kinds = kinds_of_batch(rows, 32, 0.5)
    sampler = MixedSampler(data, rows, kinds, 3, bucketing)
    scale = LatentScale.of(data.info)
    seen: set[int] = set()
    for rank in range(2):
        loader = Loader(data, sampler, BatchFormat(48, scale=scale), BatchSplit(rank, 2, 16))
        for step in range(30):
            batch = loader.micro_batch(step, 0)
            counts = RowKinds.of(batch["global_kinds"].numpy(), batch["position"].numpy()).counts
            of_row = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
            assert torch.equal(batch["latent"].isnan().all(1), of_row == TEXT)
            assert torch.equal(batch["input_ids"][:, 0] == data.info.mask_token_id, of_row == LATENT)
            assert torch.equal(batch["global_kinds"][batch["position"]], of_row)
            seen |= set(batch["index"].tolist())
    if not bucketing:  # whose window is longer than this
        assert seen == set(range(len(data)))  # of each kind every row, though there are more texts than paired rows


def test_an_option_that_a_dataset_of_before_did_not_know_is_its_default(prepared: Path, tmp_path: Path) -> None:
    arguments = ["--source", str(prepared / "texts.txt"), "--latent-dim", "8", "--vocab-size", "300"]
    out = tmp_path / "data"
    assert main([*arguments, "--out", str(out)]) == 0
    info = json.loads((out / "dataset.json").read_text())
    for name in ("encode_fraction", "unpaired", "unpaired_latents"):
        del info["options"][name]
    del info["unpaired"]
    info["format_version"] = 1
    (out / "dataset.json").write_text(json.dumps(info))
    assert main([*arguments, "--out", str(out)]) == 0
    assert main([*arguments, "--encode-fraction", "0.5", "--out", str(out)]) == 1


@pytest.mark.parametrize("array", [np.zeros((3, 4)), np.full((3, 8), np.nan), np.zeros(8)])
def test_latents_that_do_not_fit_are_refused(
    prepared: Path, tmp_path: Path, array: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "wrong.npy", array)
    arguments = ["--source", str(prepared / "texts.txt"), "--latent-dim", "8", "--vocab-size", "300"]
    assert main([*arguments, "--unpaired-latents", str(tmp_path / "wrong.npy"), "--out", str(tmp_path / "data")]) == 1
    printed = capsys.readouterr()
    assert "wrong.npy" in printed.err
    # Before texts are encoded, which may take days. The encoder's width is known only afterwards.
    assert ("shard 0" in printed.out + printed.err) == (array.shape == (3, 4))

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data import shards
from job.data.shards import FORMAT_VERSION, DatasetInfo, ShardDataset, read_info
from job.data.writer import SUMMED_ROWS, latent_sums, write_info, write_shard
from job.errors import UserError

VOCAB = 70_000


def rows(count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, size=rng.integers(1, 12)) for _ in range(count)], rng.standard_normal(
        (count, 3)
    ).astype(np.float32)


def write(
    directory: Path, sizes: tuple[int, ...] = (5, 0, 7), vocab_size: int = VOCAB
) -> tuple[DatasetInfo, list[np.ndarray], np.ndarray]:
    """Three training shards, one of them empty, and a validation shard."""
    made = [rows(size, seed) for seed, size in enumerate(sizes)]
    made = [([row % vocab_size for row in tokens], latents) for tokens, latents in made]
    records = [write_shard(directory, "train", number, *shard, vocab_size) for number, shard in enumerate(made)]
    records.append(write_shard(directory, "validation", 0, *made[0], vocab_size))
    info = write_info(
        directory,
        records,
        vocab_size=vocab_size,
        mask_token_id=1,
        pad_token_id=0,
        tokenizer=None,
        encoder={},
        options={},
        generated_by="test",
    )
    return info, [row for tokens, _ in made for row in tokens], np.concatenate([latents for _, latents in made])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    info, tokens, latents = write(tmp_path)
    dataset = ShardDataset(tmp_path, "train", verify_hashes=True)
    assert dataset.info == info
    assert len(dataset) == 12
    for index in range(12):
        ids, latent = dataset[index]
        assert ids.dtype == np.int64
        assert np.array_equal(ids, tokens[index])
        assert np.array_equal(latent, latents[index])
    indices = np.array([11, 0, 5, 5, 3])
    assert dataset.lengths(indices).tolist() == [len(tokens[index]) for index in indices]
    with pytest.raises(IndexError):
        dataset[12]


@pytest.mark.parametrize("count", [0, 1, SUMMED_ROWS, 3 * SUMMED_ROWS + 1])
def test_sums_by_the_block_are_those_of_all_to_the_bit(count: int) -> None:
    latents = (np.random.default_rng(0).standard_normal((count, 5)) * 100 + 7).astype(np.float32)
    exact = latents.astype(np.float64)
    total, squares = latent_sums(latents)
    assert total.tobytes() == exact.sum(0).tobytes()
    assert squares.tobytes() == (exact**2).sum(0).tobytes()


def test_statistics_are_those_of_the_training_split(tmp_path: Path) -> None:
    info, tokens, latents = write(tmp_path)
    np.testing.assert_allclose(info.latent_mean, latents.mean(0), rtol=1e-6)
    np.testing.assert_allclose(info.latent_std, latents.std(0), rtol=1e-6)
    assert info.token_counts == np.bincount(np.concatenate(tokens), minlength=VOCAB).tolist()
    assert info.max_length == max(map(len, tokens))


def test_a_constant_dimension_has_unit_scale(tmp_path: Path) -> None:
    tokens, latents = rows(50, 0)
    latents[:, 1] = 0.1
    records = [write_shard(tmp_path, split, 0, tokens, latents, VOCAB) for split in ("train", "validation")]
    info = write_info(
        tmp_path,
        records,
        vocab_size=VOCAB,
        mask_token_id=1,
        pad_token_id=0,
        tokenizer=None,
        encoder={},
        options={},
        generated_by="test",
    )
    assert info.latent_std[1] == 1.0
    assert 0.5 < info.latent_std[0] < 2


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_tokens_take_the_smallest_type(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    write(tmp_path, vocab_size=vocab_size)
    assert np.load(tmp_path / "train-00000.tokens.npy").dtype == dtype


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: (d / "train-00001.latents.npy").unlink(), r"train-00001\.latents\.npy: missing"),
    "truncated": (
        lambda d: (d / "train-00000.tokens.npy").write_bytes((d / "train-00000.tokens.npy").read_bytes()[:-3]),
        r"train-00000\.tokens\.npy: corrupt",
    ),
    "flipped": (lambda d: flip(d / "train-00002.offsets.npy"), r"train-00002\.offsets\.npy: corrupt, its SHA-256"),
    "tokenizer": (lambda d: flip(d / "tokenizer.json"), r"tokenizer\.json: the tokenizer was changed"),
    "json": (lambda d: (d / "dataset.json").write_text("{"), r"dataset\.json: damaged"),
    "unfinished": (lambda d: (d / "dataset.json").unlink(), r"dataset\.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line(prepared: Path, tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(prepared, directory)
    act, message = DAMAGE[damage]
    act(directory)
    with pytest.raises(UserError, match=message) as error:
        ShardDataset(directory, "train", verify_hashes=damage == "flipped")
    assert "\n" not in str(error.value)


def test_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    values = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(values | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(UserError, match="format_version 3, this version reads 2"):
        read_info(tmp_path)


def test_an_id_outside_the_vocabulary_names_its_shard(tmp_path: Path) -> None:
    write(tmp_path, sizes=(5,))
    path = tmp_path / "train-00000.tokens.npy"
    np.save(path, np.full_like(np.load(path), VOCAB))
    with pytest.raises(UserError, match=r"train-00000\.tokens\.npy: row 2 is corrupt"):
        ShardDataset(tmp_path, "train")[2]


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    prints = []
    for name, sizes in (("a", (5,)), ("b", (5,)), ("c", (6,))):
        write(tmp_path / name, sizes)
        prints.append(ShardDataset(tmp_path / name, "train").fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_opening_reads_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    opened: list[Path] = []
    original = np.load

    def watched(path: Path, **options: Any) -> np.ndarray:
        opened.append(path)
        return original(path, **options)

    monkeypatch.setattr(np, "load", watched)
    dataset = ShardDataset(tmp_path, "train")
    assert not opened
    dataset.lengths(np.array([6]))
    assert {path.name[:11] for path in opened} == {"train-00002"}


def test_lengths_in_memory_are_those_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    indices = np.array([11, 0, 5, 5, 3])
    found = {}
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(shards, "INDEXED_ROWS", 11)
        dataset = ShardDataset(tmp_path, "train")
        before = dataset.lengths(indices)
        found[kept] = before.tolist()
        assert before.dtype == np.int64
        # Written over while it is open: what is mapped changes, what is in memory does not.
        for path in tmp_path.glob("train-*.offsets.npy"):
            offsets = np.load(path, mmap_mode="r+")
            saved = offsets.copy()
            offsets[:] = 0
            assert (dataset.lengths(indices).tolist() == found[kept]) is (kept or len(offsets) == 1)
            offsets[:] = saved
    assert found[True] == found[False]


def test_a_damaged_length_is_left_for_the_row_to_tell(tmp_path: Path) -> None:
    write(tmp_path)
    offsets = np.load(tmp_path / "train-00000.offsets.npy", mmap_mode="r+")
    offsets[2] = 10**9
    dataset = ShardDataset(tmp_path, "train")
    lengths = dataset.lengths(np.arange(5))
    assert lengths[1] > 9 * 10**8
    assert lengths[2] < -9 * 10**8
    with pytest.raises(UserError, match="row 1 is corrupt"):
        dataset[1]

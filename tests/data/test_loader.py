from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from job.config import Config
from job.data import shards
from job.data.loader import Batch, BatchFormat, BatchSplit, LatentScale, Loader, evaluation_batches, open_datasets
from job.data.sampler import Sampler
from job.data.shards import INFO_FILE, SPLITS, ShardDataset
from job.data.synthetic import SyntheticDataset
from job.data.writer import write_info, write_shard
from job.errors import RetryError, UserError

DATASET = SyntheticDataset(50, 32, 4, 21, 0, "train")


def loader(
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 4,
    accumulation: int = 2,
    *,
    dataset: SyntheticDataset = DATASET,
    workers: int = 0,
    pad_to_max: bool = False,
    standardize: bool = True,
    bucketing: bool = False,
) -> Loader:
    sampler = Sampler(dataset, len(dataset), world_size * batch_size * accumulation, 7, length_bucketing=bucketing)
    batch_format = BatchFormat(48, pad_to_max, LatentScale.of(DATASET.info) if standardize else None)
    return Loader(
        dataset,
        sampler,
        batch_format,
        BatchSplit(rank, world_size, batch_size, accumulation),
        num_workers=workers,
    )


def merged(micro_batches: list[Batch]) -> Batch:
    """Micro-batches as one batch in the order of the global batch."""
    order = torch.argsort(torch.cat([batch["position"] for batch in micro_batches]))
    return {
        key: torch.cat([batch[key] for batch in micro_batches])[order]
        for key in micro_batches[0]
        if key != "global_lengths"
    }


@given(
    world_size=st.sampled_from([1, 2, 3, 4]),
    accumulation=st.sampled_from([1, 2]),
    bucketing=st.booleans(),
    start=st.integers(0, 40),
)
@settings(max_examples=15, deadline=None)
def test_any_world_size_sees_the_same_batches(world_size: int, accumulation: int, bucketing: bool, start: int) -> None:
    single = list(loader(0, 1, 24, 1, bucketing=bucketing).steps(start, start + 3))
    ranks = [
        list(
            loader(rank, world_size, 24 // world_size // accumulation, accumulation, bucketing=bucketing).steps(
                start, start + 3
            )
        )
        for rank in range(world_size)
    ]
    for step, (whole,) in enumerate(single):
        pieces = [batch for rank in ranks for batch in rank[step]]
        places = [int(rank[step][number]["position"][0]) for number in range(accumulation) for rank in ranks]
        assert places == sorted(places)  # the first forward passes of all ranks come before the second ones
        assert all(torch.equal(batch["global_lengths"], whole["global_lengths"]) for batch in pieces)
        together = merged(pieces)
        assert together["position"].tolist() == list(range(24))
        assert all(torch.equal(together[key], whole[key]) for key in together)


def test_rows_are_padded_masked_and_placed() -> None:
    for micro_batches in loader().steps(0, 5):
        for batch in micro_batches:
            lengths = batch["attention_mask"].sum(1)
            assert torch.equal(lengths, batch["global_lengths"][batch["position"]])
            assert batch["input_ids"].shape[1] == -(-int(batch["global_lengths"].max()) // 8) * 8
            for row, index, length in zip(batch["input_ids"], batch["index"], lengths, strict=True):
                assert torch.equal(row[:length], torch.from_numpy(DATASET[int(index)][0]))
                assert (row[length:] == DATASET.info.pad_token_id).all()
    assert next(loader(pad_to_max=True).steps(0, 1))[0]["input_ids"].shape[1] == 48


def test_latents_are_standardized_on_request() -> None:
    scale = LatentScale.of(DATASET.info)
    raw, scaled = (next(loader(standardize=standardize).steps(2, 3))[0] for standardize in (False, True))
    assert torch.equal(raw["latent"][0], torch.from_numpy(DATASET[int(raw["index"][0])][1]))
    torch.testing.assert_close(scaled["latent"] * scale.std + scale.mean, raw["latent"])


def test_workers_give_the_same_batches_from_any_start() -> None:
    alone, helped = list(loader().steps(3, 9)), list(loader(workers=2).steps(3, 9))
    assert len(alone) == len(helped) == 6
    for left, right in zip(alone, helped, strict=True):
        assert all(torch.equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in a)
    assert torch.equal(next(loader().steps(8, 9))[1]["input_ids"], alone[5][1]["input_ids"])


def test_loading_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    next(loader(workers=1).steps(0, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_global_batch_is_refused() -> None:
    sampler = Sampler(DATASET, len(DATASET), 24, 0)
    with pytest.raises(UserError, match="train_batch_size"):
        Loader(DATASET, sampler, BatchFormat(48), BatchSplit(0, world_size=2, batch_size=8, accumulation=2))


class Corrupt(SyntheticDataset):
    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        raise UserError("shard 3: row 5 is corrupt")


class Deadly(SyntheticDataset):
    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_row_is_one_line(workers: int) -> None:
    with pytest.raises(UserError) as error:
        next(loader(dataset=Corrupt(50, 32, 4, 21, 0, "train"), workers=workers).steps(0, 1))
    assert str(error.value) == "shard 3: row 5 is corrupt"


def test_a_dead_worker_is_one_line_worth_a_retry() -> None:
    with pytest.raises(RetryError) as error:
        next(loader(dataset=Deadly(50, 32, 4, 21, 0, "train"), workers=1).steps(0, 1))
    assert "data loader process died" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_takes_the_first_samples_once(world_size: int) -> None:
    as_it_is = BatchFormat(48)
    batches = [
        batch
        for rank in range(world_size)
        for batch in evaluation_batches(
            DATASET, as_it_is, num_samples=21, batch_size=4, rank=rank, world_size=world_size
        )
    ]
    assert sorted(int(index) for batch in batches for index in batch["index"]) == list(range(21))
    for batch in batches:
        lengths = batch["attention_mask"].sum(1)
        assert torch.equal(lengths, batch["global_lengths"][batch["position"]])
        assert batch["input_ids"].shape[1] == -(-int(lengths.max()) // 8) * 8


def shard_config(directory: Path, max_seq_len: int) -> Config:
    config = Config()
    config.data.dir = str(directory)
    config.model.max_seq_len = max_seq_len
    return config


def test_datasets_come_from_the_configuration(prepared: Path) -> None:
    train, validation = open_datasets(shard_config(prepared, 48))
    assert isinstance(train, ShardDataset)
    assert (len(train), len(validation)) == (train.info.counts["train"], train.info.counts["validation"])
    longest = train.info.max_length
    with pytest.raises(UserError, match=rf"model.max_seq_len={longest - 1} is shorter than .*\({longest} tokens\)"):
        open_datasets(shard_config(prepared, longest - 1))
    with pytest.raises(UserError, match=r"dataset\.json is missing"):
        open_datasets(shard_config(prepared.parent, 48))


@pytest.mark.parametrize("bucketed", [False, True])
def test_batches_do_not_depend_on_where_lengths_are(
    prepared: Path, bucketed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for rows in (shards.INDEXED_ROWS, 0):
        monkeypatch.setattr(shards, "INDEXED_ROWS", rows)
        train = ShardDataset(prepared, "train")
        sampler = Sampler(train, len(train), 16, seed=3, length_bucketing=bucketed)
        of_rank = Loader(train, sampler, BatchFormat(48), BatchSplit(1, 2, 4, 2))
        found.append([batch for step in of_rank.steps(0, 5) for batch in step])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_too_few_samples_to_evaluate_on_are_said_before_training(tmp_path: Path) -> None:
    texts = [np.arange(3) + number for number in range(3)]
    records = [write_shard(tmp_path, split, 0, texts, np.ones((3, 4)), 10) for split in SPLITS]
    info = write_info(
        tmp_path,
        records,
        vocab_size=10,
        mask_token_id=1,
        pad_token_id=0,
        tokenizer=None,
        encoder={},
        options={},
        generated_by="a test",
    )
    open_datasets(shard_config(tmp_path, 8))
    # As an earlier version wrote them.
    records[1] = write_shard(tmp_path, "validation", 0, texts[:1], np.ones((1, 4)), 10)
    few = {"counts": info.counts | {"validation": 1}, "shards": info.shards | {"validation": [1]}}
    (tmp_path / INFO_FILE).write_text(json.dumps(asdict(info) | few | {"files": info.files | records[1].files}))
    with pytest.raises(UserError, match=r"too few samples in the validation split \(1; .* at least 2\)"):
        open_datasets(shard_config(tmp_path, 8))


def test_synthetic_data_come_from_the_configuration() -> None:
    config = Config()
    config.data.source = "synthetic"
    train, validation = open_datasets(config)
    assert (len(train), len(validation)) == (512, 64)
    assert train.info.vocab_size == validation.info.vocab_size == 256
    assert train.info.latent_mean == validation.info.latent_mean
    assert train.fingerprint != validation.fingerprint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

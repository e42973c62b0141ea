"""Writing shards, and the description of the whole that makes them a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from job.data.shards import INFO_FILE, LEAST_ROWS, PARTS, SPLITS, DatasetInfo, shard_file
from job.errors import UserError
from job.files import file_entry, write_json, write_whole


@dataclasses.dataclass
class ShardRecord:
    """What dataset.json needs to know of a shard, so that its files need not be read again.

    Counts and sums, which add up over shards: processes write shards in any order, and one adds up their records.
    """

    split: str
    rows: int
    longest: int  # tokens
    token_counts: list[int]
    latent_sum: list[float]
    latent_square_sum: list[float]
    files: dict[str, dict[str, Any]]
    dropped: int = 0  # texts too long for a row
    without_latent: int = 0  # texts that the encoder knows nothing of


def _save(array: np.ndarray, file: BinaryIO) -> None:
    np.save(file, array, allow_pickle=False)


def write_shard(
    directory: Path, split: str, number: int, tokens: Sequence[np.ndarray], latents: np.ndarray, vocab_size: int
) -> ShardRecord:
    """Write the rows of one shard: tokens int [L] each, latents [rows, D]."""
    lengths = np.array([len(row) for row in tokens], np.int64)
    flat = np.concatenate([np.zeros(0, np.int64), *tokens])  # the empty array first: a shard may have no rows
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    latents = latents.astype(np.float32)
    smallest = np.min_scalar_type(vocab_size - 1)
    files = {}
    for part, array in zip(PARTS, (flat.astype(smallest), offsets, latents), strict=True):
        path = directory / shard_file(split, number, part)
        write_whole(path, partial(_save, array))
        files[path.name] = file_entry(path)
    exact = latents.astype(np.float64)  # float32 sums of squares lose the variance of latents with a large mean
    return ShardRecord(
        split=split,
        rows=len(tokens),
        longest=int(lengths.max(initial=0)),
        token_counts=np.bincount(flat, minlength=vocab_size).tolist(),
        latent_sum=exact.sum(0).tolist(),
        latent_square_sum=(exact**2).sum(0).tolist(),
        files=files,
    )


def _latent_statistics(records: Sequence[ShardRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [D] of the latents; the deviation is 1 in a dimension that is constant."""
    rows = sum(record.rows for record in records)
    mean = np.sum([record.latent_sum for record in records], axis=0) / rows
    variance = np.sum([record.latent_square_sum for record in records], axis=0) / rows - mean**2
    # Rounding leaves a tiny variance, of either sign, in a constant dimension; divided by its root, rounding errors
    # would become latents of unit size.
    constant = variance <= 1e-12 * np.maximum(mean**2, 1e-12)
    return mean, np.where(constant, 1.0, np.sqrt(np.maximum(variance, 0)))


def write_info(
    directory: Path,
    records: Sequence[ShardRecord],
    *,
    vocab_size: int,
    mask_token_id: int,
    pad_token_id: int,
    tokenizer: str | None,
    encoder: dict[str, Any],
    options: dict[str, Any],
    generated_by: str,
    encoder_file: str | None = None,
) -> DatasetInfo:
    """Write dataset.json, which turns the shards of `records` (in order within each split) into a dataset.

    UserError if a split has too few rows.
    """
    of_split: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
    for record in records:
        of_split[record.split].append(record)
    counts = {split: sum(record.rows for record in of_split[split]) for split in of_split}
    for split, count in counts.items():
        if count < LEAST_ROWS[split]:
            raise UserError(
                f"too few samples are left for the {split} split ({count}; it needs at least {LEAST_ROWS[split]}); "
                "give more texts, another --validation-fraction or a larger --max-length"
            )
    train = of_split["train"]
    mean, std = _latent_statistics(train)
    files = {name: entry for record in records for name, entry in record.files.items()}
    for name in filter(None, (tokenizer, encoder_file)):
        files[name] = file_entry(directory / name)
    info = DatasetInfo(
        vocab_size=vocab_size,
        latent_dim=len(mean),
        max_length=max(record.longest for record in records),
        mask_token_id=mask_token_id,
        pad_token_id=pad_token_id,
        counts=counts,
        shards={split: [record.rows for record in of_split[split]] for split in SPLITS},
        latent_mean=mean.tolist(),
        latent_std=std.tolist(),
        token_counts=np.sum([record.token_counts for record in train], axis=0).tolist(),
        encoder=encoder,
        tokenizer=tokenizer,
        files=files,
        options=options,
        generated_by=generated_by,
    )
    write_json(directory / INFO_FILE, dataclasses.asdict(info), indent=1)
    return info

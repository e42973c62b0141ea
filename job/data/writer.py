"""Writing shards, and the description of the whole that makes them a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from job.data.shards import INFO_FILE, LEAST_ROWS, SPLITS, DatasetInfo, shard_file
from job.errors import UserError
from job.files import file_entry, write_json, write_whole
from job.row_kinds import KIND_NAMES, LATENT, PAIRED, TEXT

SUMMED_ROWS = 1024  # rows of latents that are summed together


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
    kind: int = PAIRED
    dropped: int = 0  # texts too long for a row
    without_latent: int = 0  # texts that the encoder knows nothing of


def _save(array: np.ndarray, file: BinaryIO) -> None:
    np.save(file, array, allow_pickle=False)


def write_shard(
    directory: Path, split: str, number: int, tokens: Sequence[np.ndarray], latents: np.ndarray | None, vocab_size: int
) -> ShardRecord:
    """Write the rows of one shard: tokens int [L] each, latents [rows, D] (None: texts alone)."""
    lengths = np.array([len(row) for row in tokens], np.int64)
    flat = np.concatenate([np.zeros(0, np.int64), *tokens])  # the empty array first: a shard may have no rows
    arrays = {"tokens": flat.astype(np.min_scalar_type(vocab_size - 1)), "offsets": _offsets(lengths)}
    if latents is not None:
        arrays["latents"] = latents.astype(np.float32)
    record = _write(directory, split, number, arrays, lengths)
    record.token_counts = np.bincount(flat, minlength=vocab_size).tolist()
    if "latents" in arrays:
        record.latent_sum, record.latent_square_sum = (total.tolist() for total in latent_sums(arrays["latents"]))
    else:
        record.kind = TEXT
    return record


def latent_sums(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sums of squares float64 [D] of latents [rows, D].

    In float64: float32 sums of squares lose the variance of latents with a large mean. A few rows at a time: copies of
    all take gigabytes, and longer than writing the shard. Each block's sum begins with what was there before, so the
    rows are added in the same order as by one sum over all, which gives the same bits.
    """
    totals: list[np.ndarray] = []
    for start in range(0, max(1, len(latents)), SUMMED_ROWS):
        block = latents[start : start + SUMMED_ROWS].astype(np.float64)
        before = totals or [block[:0], block[:0]]
        totals = [np.vstack([so_far, rows]).sum(0) for so_far, rows in zip(before, (block, block**2), strict=True)]
    return totals[0], totals[1]


def write_latents_shard(directory: Path, number: int, lengths: np.ndarray, latents: np.ndarray) -> ShardRecord:
    """Write the training shard of latents [rows, D] alone, of texts that are likely to have so many tokens [rows]."""
    arrays = {"offsets": _offsets(lengths), "latents": latents.astype(np.float32)}
    record = _write(directory, "train", number, arrays, lengths)
    record.kind = LATENT
    return record


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _write(directory: Path, split: str, number: int, arrays: dict[str, np.ndarray], lengths: np.ndarray) -> ShardRecord:
    files = {}
    for part, array in arrays.items():
        path = directory / shard_file(split, number, part)
        write_whole(path, partial(_save, array))
        files[path.name] = file_entry(path)
    return ShardRecord(split, len(lengths), int(lengths.max(initial=0)), [], [], [], files)


def _latent_statistics(records: Sequence[ShardRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [D] of the latents; the deviation is 1 in a dimension that is constant."""
    rows = sum(record.rows for record in records)  # paired ones: latents alone may be of anything
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
    paired_counts = {split: sum(record.rows for record in of_split[split] if record.kind == PAIRED) for split in SPLITS}
    # Only options of the command that writes: `job.convert` has no --encode-fraction.
    larger = [f"a larger --{name.replace('_', '-')}" for name in ("max_length", "encode_fraction") if name in options]
    for split, count in paired_counts.items():
        if count < LEAST_ROWS[split]:
            raise UserError(
                f"too few samples are left for the {split} split ({count}; it needs at least {LEAST_ROWS[split]}); "
                f"give {', '.join(['more texts', *larger])} or another --validation-fraction"
            )
    train = of_split["train"]
    paired, texts, latents = ([record for record in train if record.kind == kind] for kind in (PAIRED, TEXT, LATENT))
    mean, std = _latent_statistics(paired)
    unpaired = {
        KIND_NAMES[kind]: sum(record.rows for record in of_kind)
        for kind, of_kind in ((TEXT, texts), (LATENT, latents))
        if of_kind
    }
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
        token_counts=np.sum([record.token_counts for record in [*paired, *texts]], axis=0).tolist(),
        encoder=encoder,
        tokenizer=tokenizer,
        files=files,
        options=options,
        generated_by=generated_by,
        unpaired=unpaired,
    )
    write_json(directory / INFO_FILE, dataclasses.asdict(info), indent=1)
    return info

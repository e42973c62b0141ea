"""Training rows that lack a half: shards of texts without latents, and of latents without texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from job.data.console import say
from job.data.fitting import chunks, fits
from job.data.lengths import LENGTH_SAMPLES, fit_lengths, predicted_lengths
from job.data.shards import shard_file
from job.data.tokenizer import TextTokenizer
from job.data.work import Preparation, TextShard
from job.data.writer import ShardRecord, write_latents_shard, write_shard
from job.errors import UserError
from job.row_kinds import PAIRED


def write_texts(
    preparation: Preparation,
    shard: TextShard,
    texts: Sequence[str],
    tokenizer: TextTokenizer,
    plan: dict[str, Any],
) -> ShardRecord:
    """Write a shard of texts alone, those left out that are too long."""
    rows = [row for chunk in chunks(texts) for row in tokenizer.encode(chunk)]
    fitting = [row for row in rows if fits(row, preparation.options.max_length)]
    record = write_shard(preparation.out, shard.split, shard.number, fitting, None, plan["vocab_size"])
    record.dropped = len(rows) - len(fitting)
    say(f"{shard.split} shard {shard.number}: {record.rows} rows without latents")
    return record


def write_latents(preparation: Preparation, records: Sequence[ShardRecord], file: Path) -> list[ShardRecord]:
    """Write the shards of --unpaired-latents, which lie in `file`, behind all others; returns their records.

    A latent alone is decoded to a text in training, which must have some length: the likely one.
    """
    latents = finite_latents(str(preparation.options.unpaired_latents), file)
    paired = [record for record in records if record.split == "train" and record.kind == PAIRED]
    first = _arrays_of(preparation.out, paired)
    if latents.shape[1] != first[0].shape[1]:
        raise UserError(
            f"--unpaired-latents {preparation.options.unpaired_latents}: {latents.shape[1]} dimensions, "
            f"but the encoder's latents have {first[0].shape[1]}"
        )
    lengths = predicted_lengths(fit_lengths(*first), latents, max(record.longest for record in paired))
    number = sum(record.split == "train" for record in records)
    size = preparation.options.shard_size
    return [
        write_latents_shard(
            preparation.out, number + shard, lengths[start : start + size], latents[start : start + size]
        )
        for shard, start in enumerate(range(0, len(latents), size))
    ]


def _arrays_of(directory: Path, paired: Sequence[ShardRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Latents [N, D] and token counts [N] of the first LENGTH_SAMPLES paired rows."""
    latents: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for number in range(len(paired)):
        latents.append(np.load(directory / shard_file("train", number, "latents"), mmap_mode="r"))
        lengths.append(np.diff(np.load(directory / shard_file("train", number, "offsets"), mmap_mode="r")))
        if sum(map(len, lengths)) >= LENGTH_SAMPLES:
            break
    return np.concatenate(latents)[:LENGTH_SAMPLES], np.concatenate(lengths)[:LENGTH_SAMPLES]


def finite_latents(name: str, path: Path) -> np.ndarray:
    """The latents [N, D] of a file. UserError when they are none, or not all finite."""
    try:
        latents: np.ndarray = np.load(path, allow_pickle=False)  # a pickle could run code
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"--unpaired-latents {name}: cannot be read as a file of numpy ({error})") from error
    if latents.ndim != 2 or not len(latents):
        raise UserError(f"--unpaired-latents {name}: an array of shape {list(latents.shape)}, not [rows, dimensions]")
    bad = np.flatnonzero(~np.isfinite(latents).all(1))
    if len(bad):
        raise UserError(f"--unpaired-latents {name}: row {bad[0] + 1} holds a number that is not finite")
    return latents

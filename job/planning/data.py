"""What a plan must know of the data, also where it is not prepared yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from job.config import Config
from job.data.cached import first_lengths, info_at
from job.data.loader import open_datasets, refuse_unfit
from job.data.shards import Dataset
from job.errors import UserError
from job.files import is_url

COUNTED_ROWS = 4096  # training rows whose lengths are read, the first ones: they come in the order of hashes


@dataclass(frozen=True)
class PlannedData:
    """The size of the data."""

    vocab_size: int
    latent_dim: int
    samples: int | None  # training rows; None where they are not known
    lengths: np.ndarray  # tokens of some rows, int64 [N]
    prepared: bool  # False: lengths are a guess


def planned_data(config: Config, mean_tokens: float | None) -> PlannedData:
    """The data of a configuration; where data.dir is not there, what model.vocab_size and model.latent_dim say.

    Rows then have `mean_tokens` tokens, or else as many as the model takes. UserError where neither tells, and for a
    store that cannot be asked.
    """
    model, directory = config.model, config.data.dir or ""
    if config.data.source == "synthetic" or (directory and Path(directory).is_dir()):
        train = open_datasets(config)[0]
        return _of_dataset(train)
    if is_url(directory) and (found := _of_store(config, directory)):
        return found
    if model.vocab_size is None or model.latent_dim is None:
        missing = "no finished dataset there" if is_url(directory) else "no such directory here"
        raise UserError(
            f"data.dir={directory}: {missing}; prepare the data, or say its size with "
            "model.vocab_size=N model.latent_dim=N (and --mean-tokens N)"
        )
    mean = mean_tokens or model.max_seq_len
    if not 1 <= mean <= model.max_seq_len:
        raise UserError(f"--mean-tokens {mean:g}: the model takes 1 to {model.max_seq_len} tokens (model.max_seq_len)")
    return PlannedData(model.vocab_size, model.latent_dim, None, np.array([round(mean)]), prepared=False)


def _of_dataset(train: Dataset) -> PlannedData:
    lengths = train.lengths(np.arange(min(COUNTED_ROWS, len(train))))
    return PlannedData(train.info.vocab_size, train.info.latent_dim, len(train), lengths, prepared=True)


def _of_store(config: Config, url: str) -> PlannedData | None:
    """The data of a URL, of which the description and some lengths are read; None where there is none."""
    info = info_at(url)
    if info is None:
        return None
    refuse_unfit(info, url, config.model.max_seq_len)
    lengths = first_lengths(url, info, COUNTED_ROWS)
    return PlannedData(info.vocab_size, info.latent_dim, info.counts["train"], lengths, prepared=True)


def longest_of_a_batch(config: Config, lengths: np.ndarray) -> int:
    """Tokens that the longest row of a batch is likely to have: batches are padded to it."""
    if config.data.pad_to_max:
        return config.model.max_seq_len
    # The share of rows that are shorter than the longest of n is about n / (n + 1).
    rows = config.training.train_batch_size
    return math.ceil(float(np.quantile(lengths, rows / (rows + 1))))

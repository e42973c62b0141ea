"""From dataset indices to the padded batches of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from job.config import Config
from job.data.sampler import Sampler
from job.data.shards import Dataset, DatasetInfo, ShardDataset, Split
from job.data.synthetic import SyntheticDataset
from job.errors import RetryError, UserError

Batch = dict[str, torch.Tensor]
LENGTH_MULTIPLE = 8  # row lengths are rounded up to it: aligned for tensor cores, and fewer shapes to compile


def open_datasets(config: Config) -> tuple[Dataset, Dataset]:
    """Training and validation split that `config.data` names. UserError for a damaged dataset or rows longer than model.max_seq_len."""
    data, longest = config.data, config.model.max_seq_len
    if data.source == "synthetic":
        counts: dict[Split, int] = {"train": data.synthetic_samples, "validation": max(8, data.synthetic_samples // 8)}
        synthetic = {
            split: SyntheticDataset(
                count, data.synthetic_vocab_size, data.synthetic_latent_dim, longest, config.training.seed, split
            )
            for split, count in counts.items()
        }
        return synthetic["train"], synthetic["validation"]
    directory = Path(data.dir or "")
    train, validation = ShardDataset(directory, "train", data.verify_hashes), ShardDataset(directory, "validation")
    if train.info.max_length > longest:
        raise UserError(
            f"model.max_seq_len={longest} is shorter than the longest row of {directory} ({train.info.max_length} tokens); "
            f"set model.max_seq_len={-(-train.info.max_length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE} or prepare with --max-length {longest}"
        )
    if not len(validation):
        raise UserError(
            f"{directory}: the validation split is empty; prepare with a larger --validation-fraction or more texts"
        )
    return train, validation


def latent_scale(info: DatasetInfo) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the training latents, float32 [D] each: standardized = (raw - mean) / std."""
    return torch.tensor(info.latent_mean), torch.tensor(info.latent_std)


def padded_length(lengths: np.ndarray, max_seq_len: int, pad_to_max: bool) -> int:
    """Row length S that holds the longest of `lengths`."""
    return max_seq_len if pad_to_max else min(max_seq_len, -(-int(lengths.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def collate(
    dataset: Dataset,
    indices: np.ndarray,
    positions: np.ndarray,
    global_lengths: np.ndarray,
    seq_len: int,
    standardize: bool,
) -> Batch:
    """Samples `indices` as one batch of rows padded to `seq_len`.

    input_ids int64 [B, S], attention_mask bool [B, S] (True on real tokens), latent float32 [B, D], position int64 [B] (place of each row
    in the global batch), global_lengths int64 [G] (token counts of the whole global batch), index int64 [B] (place in the dataset).
    """
    rows = [dataset[int(index)] for index in indices]
    input_ids = np.full((len(rows), seq_len), dataset.info.pad_token_id, np.int64)
    for row, (tokens, _) in zip(input_ids, rows, strict=True):
        row[: len(tokens)] = tokens
    latent = torch.from_numpy(np.stack([latent for _, latent in rows]))
    if standardize:
        mean, std = latent_scale(dataset.info)
        latent = (latent - mean) / std
    lengths = np.array([len(tokens) for tokens, _ in rows])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(np.arange(seq_len) < lengths[:, None]),
        "latent": latent,
        "position": torch.from_numpy(positions),
        "global_lengths": torch.from_numpy(global_lengths),
        "index": torch.from_numpy(indices),
    }


class Loader(TorchDataset["Batch | UserError"]):
    """The batches of one rank. Micro-batch m of rank r holds places [(m * world_size + r) * batch_size, + batch_size) of the global
    batch, so that any number of ranks sees the same samples in the same order, all padded to one length per step.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        accumulation: int,
        max_seq_len: int,
        pad_to_max: bool,
        standardize: bool,
        num_workers: int,
        pin_memory: bool,
        worker_init: Callable[[int], None] | None = None,
    ) -> None:
        if sampler.global_batch_size != world_size * batch_size * accumulation:
            raise UserError(
                f"global batch of {sampler.global_batch_size} is not training.train_batch_size={batch_size} x {world_size} ranks x "
                f"{accumulation} accumulation steps"
            )
        self.dataset, self.sampler = dataset, sampler
        self.rank, self.world_size, self.batch_size, self.accumulation = rank, world_size, batch_size, accumulation
        self.max_seq_len, self.pad_to_max, self.standardize = max_seq_len, pad_to_max, standardize
        self.num_workers, self.pin_memory, self.worker_init = num_workers, pin_memory, worker_init

    def micro_batch(self, step: int, number: int) -> Batch:
        """Micro-batch `number` of an optimizer step."""
        indices = self.sampler.batch(step)
        lengths = self.dataset.lengths(indices)
        start = (number * self.world_size + self.rank) * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        seq_len = padded_length(lengths, self.max_seq_len, self.pad_to_max)
        return collate(self.dataset, indices[positions], positions, lengths, seq_len, self.standardize)

    def __getitem__(self, number: int) -> Batch | UserError:
        """Micro-batch `number` counted from step 0. An error is returned, not raised: torch would wrap it in a worker's traceback."""
        try:
            return self.micro_batch(*divmod(number, self.accumulation))
        except UserError as error:
            return error

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """For each optimizer step of [start, stop) its micro-batches; starting late costs nothing."""
        # A generator of its own: the DataLoader draws a seed for its workers and must not touch the global one.
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start * self.accumulation, stop * self.accumulation),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init,
            generator=torch.Generator(),
        )
        micro_batches: list[Batch] = []
        try:
            for item in loader:
                if isinstance(item, UserError):
                    raise item
                micro_batches.append(item)
                if len(micro_batches) == self.accumulation:
                    yield micro_batches
                    micro_batches = []
        except RuntimeError as error:
            raise dead_worker(error) or error from error


def dead_worker(error: BaseException) -> RetryError | None:
    """The one-line form of torch's error for a loader process that died, or None for another error.

    Torch raises it from a signal handler, so that it can also surface outside `Loader.steps`, at any line of the main thread.
    """
    text = str(error)
    if "DataLoader worker" not in text:
        return None
    return RetryError(
        f"a data loader process died: {text.splitlines()[0]} (often out of memory; data.num_workers=0 loads in the training process)"
    )


def evaluation_batches(
    dataset: Dataset,
    *,
    num_samples: int,
    batch_size: int,
    rank: int,
    world_size: int,
    max_seq_len: int,
    pad_to_max: bool,
    standardize: bool,
) -> Iterator[Batch]:
    """This rank's batches of the first `num_samples` samples (all, if there are fewer): batch j goes to rank j % world_size.

    `position` is the place in the evaluation set and `global_lengths` covers that set; the last batch may be short, and a rank may get one less.
    """
    chosen = np.arange(min(num_samples, len(dataset)))
    lengths = dataset.lengths(chosen)
    for start in range(rank * batch_size, len(chosen), world_size * batch_size):
        places = chosen[start : start + batch_size]
        yield collate(
            dataset, places, places, lengths, padded_length(lengths[places], max_seq_len, pad_to_max), standardize
        )

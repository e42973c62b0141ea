"""From dataset indices to the padded batches of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from job.config import Config
from job.data.cached import local_copy
from job.data.description import ModelDescription
from job.data.sampler import MixedSampler, Sampler
from job.data.shards import LEAST_ROWS, Dataset, DatasetInfo, ShardDataset, Split
from job.data.synthetic import SyntheticDataset
from job.errors import JobError, RetryError, UserError
from job.files import is_url

Batch = dict[str, torch.Tensor]
LENGTH_MULTIPLE = 8  # row lengths are rounded up to it: aligned for tensor cores, and fewer shapes to compile


@dataclass(frozen=True)
class LatentScale:
    """How latents are standardized: (raw - mean) / std, with the statistics [D] of the data that a model knows."""

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, statistics: DatasetInfo | ModelDescription) -> LatentScale:
        """Mean and standard deviation of the training latents."""
        mean, std = statistics.latent_mean, statistics.latent_std
        return cls(torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32))

    def standardized(self, raw: torch.Tensor) -> torch.Tensor:
        """Latents [N, D] as a model sees them."""
        return (raw - self.mean) / self.std

    def raw(self, standardized: torch.Tensor) -> torch.Tensor:
        """Latents [N, D] in the encoder's own units."""
        return standardized * self.std + self.mean


def scale_of(description: ModelDescription) -> LatentScale | None:
    """How a model's latents are standardized; None: not at all.

    UserError for a model that was exported before exports had statistics.
    """
    if not description.standardize:
        return None
    if not description.latent_mean:
        raise UserError(
            "this model was exported without its latents' mean and standard deviation; export it again from its run, "
            "or name the run's data with --data DIR"
        )
    return LatentScale.of(description)


@dataclass(frozen=True)
class BatchFormat:
    """How samples become the rows of a batch."""

    max_seq_len: int
    pad_to_max: bool = False  # to max_seq_len, instead of to the longest row
    scale: LatentScale | None = None  # how latents are standardized; None: left as they are

    @classmethod
    def of(cls, config: Config, description: ModelDescription) -> BatchFormat:
        """What a configuration says, with the statistics of the model: not those of the data that is read.

        A model knows latents as its own training standardized them. With the statistics of other data they would move,
        and nothing would show it but worse figures.
        """
        return cls(config.model.max_seq_len, config.data.pad_to_max, scale_of(description))

    def seq_len(self, lengths: np.ndarray) -> int:
        """Row length S that holds the longest of `lengths`."""
        if self.pad_to_max:
            return self.max_seq_len
        return min(self.max_seq_len, rounded_up(int(lengths.max())))


@dataclass(frozen=True)
class BatchSplit:
    """Which part of every global batch a rank makes, and in how many micro-batches of `batch_size` rows."""

    rank: int
    world_size: int
    batch_size: int
    accumulation: int = 1  # micro-batches a step


def rounded_up(length: int) -> int:
    """The next multiple of LENGTH_MULTIPLE."""
    return (length + LENGTH_MULTIPLE - 1) // LENGTH_MULTIPLE * LENGTH_MULTIPLE


def open_datasets(config: Config) -> tuple[Dataset, Dataset]:
    """Training and validation split that `config.data` names.

    Raises UserError for a damaged dataset, rows longer than model.max_seq_len, or too few samples to evaluate on.
    """
    if config.data.source == "synthetic":
        return _synthetic(config, "train"), _synthetic(config, "validation")
    directory = _directory(config)
    train = ShardDataset(directory, "train", config.data.verify_hashes)
    validation = ShardDataset(directory, "validation")
    refuse_unfit(train.info, str(directory), config.model.max_seq_len)
    return train, validation


def refuse_unfit(info: DatasetInfo, where: str, longest: int) -> None:
    """UserError for a dataset of longer rows than the model takes, or of too few samples to evaluate on."""
    if info.max_length > longest:
        raise UserError(
            f"model.max_seq_len={longest} is shorter than the longest row of {where} "
            f"({info.max_length} tokens); set model.max_seq_len={rounded_up(info.max_length)} "
            f"or prepare with --max-length {longest}"
        )
    # Said before the first step: the evaluation that needs them comes after the last one.
    if info.counts["validation"] < LEAST_ROWS["validation"]:
        raise UserError(
            f"{where}: too few samples in the validation split ({info.counts['validation']}; an evaluation compares at "
            f"least {LEAST_ROWS['validation']}); prepare with a larger --validation-fraction or more texts"
        )


def _directory(config: Config) -> Path:
    """Where the shards are: data.dir, or the copy of what it names in a store."""
    name = config.data.dir or ""
    return local_copy(name, Path(config.data.cache_dir or "")) if is_url(name) else Path(name)


def _synthetic(config: Config, split: Split) -> SyntheticDataset:
    data = config.data
    count = data.synthetic_samples if split == "train" else max(8, data.synthetic_samples // 8)
    return SyntheticDataset(
        count,
        data.synthetic_vocab_size,
        data.synthetic_latent_dim,
        config.model.max_seq_len,
        config.training.seed,
        split,
    )


def collate(
    dataset: Dataset,
    indices: np.ndarray,
    positions: np.ndarray,
    global_lengths: np.ndarray,
    seq_len: int,
    scale: LatentScale | None,
) -> Batch:
    """Samples `indices` as one batch of rows padded to `seq_len`.

    input_ids int64 [B, S], attention_mask bool [B, S] (True on real tokens), latent float32 [B, D], position int64 [B]
    (place of each row in the global batch), global_lengths int64 [G] (token counts of the whole global batch), index
    int64 [B] (place in the dataset).
    """
    rows = [dataset[int(index)] for index in indices]
    input_ids = np.full((len(rows), seq_len), dataset.info.pad_token_id, np.int64)
    for row, (tokens, _) in zip(input_ids, rows, strict=True):
        row[: len(tokens)] = tokens
    latent = torch.from_numpy(np.stack([latent for _, latent in rows]))
    if scale is not None:
        latent = scale.standardized(latent)
    lengths = np.array([len(tokens) for tokens, _ in rows])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(np.arange(seq_len) < lengths[:, None]),
        "latent": latent,
        "position": torch.from_numpy(positions),
        "global_lengths": torch.from_numpy(global_lengths),
        "index": torch.from_numpy(indices),
    }


class Loader(TorchDataset["Batch | JobError"]):
    """The batches of one rank, all padded to one length per step.

    Micro-batch m of rank r holds places [(m * world_size + r) * batch_size, + batch_size) of the global batch, so that
    any number of ranks sees the same samples in the same order.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler | MixedSampler,
        format: BatchFormat,
        split: BatchSplit,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        worker_init: Callable[[int], None] | None = None,
    ) -> None:
        """Raises UserError when the ranks' shares do not make up the sampler's global batch."""
        if sampler.global_batch_size != split.world_size * split.batch_size * split.accumulation:
            raise UserError(
                f"global batch of {sampler.global_batch_size} is not training.train_batch_size={split.batch_size} x "
                f"{split.world_size} ranks x {split.accumulation} accumulation steps"
            )
        self.dataset, self.sampler, self.format, self.split = dataset, sampler, format, split
        self.num_workers, self.pin_memory, self.worker_init = num_workers, pin_memory, worker_init

    def micro_batch(self, step: int, number: int) -> Batch:
        """Micro-batch `number` of an optimizer step.

        Of data with several kinds of rows they come in the order of their kinds, with global_kinds int64 [G].
        """
        indices = self.sampler.batch(step)
        lengths = self.dataset.lengths(indices)
        start = (number * self.split.world_size + self.split.rank) * self.split.batch_size
        positions = np.arange(start, start + self.split.batch_size)
        kinds = self.sampler.kinds
        if kinds is not None:
            positions = positions[np.argsort(kinds[positions], kind="stable")]
        seq_len = self.format.seq_len(lengths)
        batch = collate(self.dataset, indices[positions], positions, lengths, seq_len, self.format.scale)
        if kinds is not None:
            batch["global_kinds"] = torch.from_numpy(kinds)
        return batch

    def __getitem__(self, number: int) -> Batch | JobError:
        """Micro-batch `number` counted from step 0.

        An error is returned, not raised: torch would wrap it in the traceback of a loader process.
        """
        try:
            return self.micro_batch(*divmod(number, self.split.accumulation))
        except JobError as error:
            return error

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """For each optimizer step of [start, stop) its micro-batches; starting late costs nothing."""
        accumulation = self.split.accumulation
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start * accumulation, stop * accumulation),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init,
            # Of its own: the DataLoader draws a seed for its workers, and must not touch the global generator.
            generator=torch.Generator(),
        )
        micro_batches: list[Batch] = []
        try:
            for item in loader:
                if isinstance(item, JobError):
                    raise item
                micro_batches.append(item)
                if len(micro_batches) == accumulation:
                    yield micro_batches
                    micro_batches = []
        except RuntimeError as error:
            raise dead_worker(error) or error from error


def dead_worker(error: BaseException) -> RetryError | None:
    """The one-line form of torch's error for a loader process that died, or None for another error.

    Torch raises it from a signal handler, so that it can also surface outside `Loader.steps`, at any line of the main
    thread. It has no class of its own: only its text tells it from other errors.
    """
    text = str(error)
    if "DataLoader worker" not in text:
        return None
    return RetryError(
        f"a data loader process died: {text.splitlines()[0]} "
        "(often out of memory; data.num_workers=0 loads in the training process)"
    )


def evaluation_batches(
    dataset: Dataset, format: BatchFormat, *, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """A rank's batches of the first `num_samples` samples, or of all: batch j goes to rank j % world_size.

    `position` is the place in the evaluation set and `global_lengths` covers that set; the last batch may be short, and
    a rank may get one less.
    """
    chosen = np.arange(min(num_samples, len(dataset)))
    lengths = dataset.lengths(chosen)
    for start in range(rank * batch_size, len(chosen), world_size * batch_size):
        places = chosen[start : start + batch_size]
        yield collate(dataset, places, places, lengths, format.seq_len(lengths[places]), format.scale)

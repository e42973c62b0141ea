"""A trained model as it lies on disk: a run directory, one of its checkpoints, or an exported directory.

An exported directory (`job.export` writes it) holds all that a program needs of a run, and no data:

    model.safetensors    weights, with the settings that their shapes mean, and the description, in the header
    config.json          the run's configuration, the step, whether the weights are the moving average, their SHA-256
    model.json, tokenizer.json, encoder.safetensors    as in RUN/model (job.data.description)
    README.md            the model card
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from job import checkpoint_names
from job.config import Config, from_dict
from job.data.cached import local_copy
from job.data.description import (
    DESCRIPTION_FILE,
    DIRECTORY,
    ModelDescription,
    describe_dataset,
    find_tokenizer,
    from_values,
    is_file,
    read_description,
    refuse_other_data,
)
from job.data.loader import Batch, BatchFormat, evaluation_batches, open_datasets
from job.data.shards import Dataset, ShardDataset
from job.data.tokenizer import TOKENIZER_FILE, TextTokenizer, load, of_dataset
from job.errors import UserError
from job.files import file_entry, is_url
from job.model.build import build_model
from job.model.weights import WEIGHTS_FILE, describe
from job.objective.objective import Objective
from job.runtime.checkpoint import Checkpoint, open_checkpoint, read_weights

CONFIG_FILE = "config.json"
WEIGHTS_KEY = "weights"  # of config.json: size and SHA-256 of the weights; missing in exports of before 2026-11-28
RECORD_KEY = "description"  # of the ModelDescription in a checkpoint's record and in the header of exported weights


@dataclass
class Trained:
    """What a run learned, and what is needed to use it."""

    path: Path
    config: Config
    step: int
    weights: dict[str, Tensor]  # on the CPU, by the names of the model's parameters
    averaged: bool  # the weights are the moving average
    description: ModelDescription
    directories: list[Path]  # where the description's files may be
    data: Path | None  # prepared data to use instead of the run's own

    def __post_init__(self) -> None:
        # The tokenizer is read when it is first needed, and a program may have changed its directory by then.
        self.directories = [directory.absolute() for directory in self.directories]

    @property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary, which may be larger than the tokenizer's."""
        return int(describe(self.weights)["vocab_size"])

    @property
    def latent_dim(self) -> int:
        """Dimension of the latents."""
        return int(describe(self.weights)["latent_dim"])

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """The tokenizer; None when the data came without one, or when it is nowhere to be found."""
        return find_tokenizer(self.description, self.directories)

    @cached_property
    def format(self) -> BatchFormat:
        """How samples become what the model sees, with its own statistics."""
        return BatchFormat.of(self.config, self.description)

    def objective(self, device: torch.device) -> Objective:
        """The model inside its objective, on a device, in evaluation mode."""
        model = build_model(self.config.model, self.vocab_size, self.latent_dim, seed=0)
        model.load_state_dict(self.weights)
        special = self.description.mask_token_id, self.description.pad_token_id
        return Objective(model, self.config, *special).to(device).eval()

    @cached_property
    def held_out(self) -> Dataset:
        """The validation split of `data`, or else of the run's own data.

        Notes go to standard error. UserError where there is none, and for data that the model cannot read.
        """
        if self.data is None and (self.path / CONFIG_FILE).is_file() and self.config.data.source == "shards":
            raise UserError(f"{self.path}: an exported model comes without data; name a prepared directory: --data DIR")
        dataset = open_data(self.config, self.data, self.path)[1]
        directory = dataset.directory if isinstance(dataset, ShardDataset) else "the synthetic data"
        for note in refuse_other_data(self.description, dataset.info, (str(self.path), str(directory))):
            print(f"note: {note}", file=sys.stderr)
        return dataset


def load_trained(
    path: Path, data: Path | str | None = None, average: bool | None = None, cache: Path | None = None
) -> Trained:
    """What `path` holds: a run directory, a checkpoint, or a directory written by `python -m job.convert export`.

    `data` replaces the data directory of the run, as a path or as the URL of a store, and `cache` is where data of a
    URL is copied to (None: where the run did); `average` takes the moving average of the weights (None: where there is
    one). Weights that are not finite are a warning on standard error. Raises UserError, in one line, when there is no
    valid checkpoint, no average, or data of another kind.
    """
    if not path.exists():
        raise UserError(f"{path}: no such directory; give a run directory like runs/demo or a checkpoint in it")
    if (path / CONFIG_FILE).is_file():
        trained = _load_export(path, data, average, cache)
    elif (path / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{path / CONFIG_FILE}: missing, so nothing says what model {WEIGHTS_FILE} is of; copy the exported "
            "directory as a whole, or export it again with `python -m job.convert export`"
        )
    else:
        trained = _load_checkpoint(path, data, average, cache)
    if broken := [name for name, tensor in trained.weights.items() if not tensor.sum().isfinite()]:
        print(
            f"warning: {path}: {len(broken)} of {len(trained.weights)} tensors of weights hold NaN or infinity, such "
            f"as {broken[0]}: what this model gives means nothing; take an earlier checkpoint",
            file=sys.stderr,
        )
    if data is not None:
        _ = trained.held_out  # whoever names data is told at once what is wrong with it
    return trained


def _on_disk(config: Config, data: Path | str | None, cache: Path | None) -> Path | None:
    """The directory of the data that a user names: of the URL of a store its copy, made if need be.

    Copies, also that of the run's own data, lie below `cache`, or else where the run had its own. UserError where
    neither is known, and for a `cache` that nothing is copied to.
    """
    named = str(data) if data is not None else config.data.dir or ""
    if not is_url(named):
        if cache is not None:
            raise UserError(
                f"--cache-dir {cache} has no effect: the data is not the URL of a store (s3://...); leave it out"
            )
        return Path(data) if data is not None else None
    place = str(cache) if cache is not None else config.data.cache_dir
    if place is None:
        raise UserError(f"--data {named} is copied to this machine; name a directory that has room: --cache-dir DIR")
    if data is None:
        config.data.cache_dir = place
        return None
    return local_copy(named, Path(place))


# A run or a checkpoint.


def run_directory(checkpoint: Path) -> Path:
    """The run directory of RUN/checkpoints/step_N; of a checkpoint that was copied alone, its own directory."""
    return checkpoint.parent.parent if checkpoint.parent.name == checkpoint_names.DIRECTORY else checkpoint


def open_saved(path: Path) -> Checkpoint:
    """The checkpoint of a path, as `open_checkpoint` finds it. UserError also for a run that has saved none yet."""
    for run in (path, path.parent):
        checkpoints = run / checkpoint_names.DIRECTORY
        is_run = (run / "config.yaml").is_file() and path in (run, checkpoints)
        if is_run and not checkpoint_names.steps(checkpoints):
            raise UserError(
                f"{run}: no checkpoint in this run yet; it saves every logging.save_freq steps, at its end and when it "
                "is stopped"
            )
    return open_checkpoint(path)


def described(checkpoint: Checkpoint) -> ModelDescription | None:
    """What a checkpoint says of its data; None in one from before checkpoints did."""
    values = checkpoint.record.get(RECORD_KEY)
    return from_values(values, checkpoint.path / checkpoint_names.COMMIT_FILE) if values else None


def weights_of(checkpoint: Checkpoint, average: bool | None = None) -> tuple[dict[str, Tensor], bool]:
    """Weights of a checkpoint on the CPU, and whether they are the moving average (None: where there is one).

    UserError when an average is asked for and there is none.
    """
    averaged = {} if average is False else read_weights(checkpoint, "optimizer.average.")
    if average and not averaged:
        raise UserError(
            f"{checkpoint.path} holds no moving average; leave out --ema, or train with training.ema_decay above 0"
        )
    # The average is of parameters only; buffers are the model's.
    return read_weights(checkpoint, "model.") | averaged, bool(averaged)


def _load_checkpoint(path: Path, named: Path | str | None, average: bool | None, cache: Path | None) -> Trained:
    checkpoint, weights, averaged = _read_saved(path, average)
    config = from_dict(checkpoint.record["config"])
    data = _on_disk(config, named, cache)
    run = run_directory(checkpoint.path)
    # A checkpoint from before checkpoints described their data needs that data, as it always did.
    description = described(checkpoint) or _described_by_data(config, data, weights, checkpoint.path)
    given = [data] if data else []
    own = [Path(config.data.dir)] if config.data.dir else []
    return Trained(path, config, checkpoint.step, weights, averaged, description, [run / DIRECTORY, *given, *own], data)


def _read_saved(path: Path, average: bool | None) -> tuple[Checkpoint, dict[str, Tensor], bool]:
    """The checkpoint of a path with its weights.

    A run that is training removes old checkpoints, also the one that is just being read; then its next one is taken.
    """
    while True:
        checkpoint = open_saved(path)
        try:
            return checkpoint, *weights_of(checkpoint, average)
        except OSError:
            if checkpoint.path.exists():
                raise
            if checkpoint.path == path:
                raise UserError(f"{path}: removed while it was read; give the run's directory instead") from None


def _described_by_data(config: Config, data: Path | None, weights: dict[str, Tensor], path: Path) -> ModelDescription:
    """The description that a model's data gives. UserError where it is not here, or cannot be the model's."""
    description = describe_dataset(open_data(config, data, path)[0], config.data.standardize_latents)
    latent_dim, vocab_size = (int(describe(weights)[name]) for name in ("latent_dim", "vocab_size"))
    # The model's vocabulary may be larger: it is rounded up to model.vocab_multiple.
    if description.latent_dim != latent_dim or description.vocab_size > vocab_size:
        raise UserError(
            f"--data {config.data.dir}: vocabulary of {description.vocab_size} and latents of {description.latent_dim} "
            f"dimensions do not fit {path}; give the data that the run was trained on"
        )
    return description


def open_data(config: Config, data: Path | None, path: Path) -> tuple[Dataset, Dataset]:
    """Training and validation split of the data of the run at `path`, or of `data` in its place.

    The run's data may be named relative to the directory it was started in, which environment.json knows.
    """
    if data is not None:
        config.data.source, config.data.dir, config.data.cache_dir = "shards", str(data), None
    elif (
        config.data.source == "shards"
        and not is_url(config.data.dir or "")
        and not Path(config.data.dir or "").is_dir()
    ):
        there = _started_in(path) / (config.data.dir or "")
        if not there.is_dir():
            raise UserError(f"{config.data.dir}: the run's data directory is not here; name it with --data DIR")
        config.data.dir = str(there)
    return open_datasets(config)


def _started_in(path: Path) -> Path:
    """The directory that a run was started in, or else the present one."""
    for directory in (path, *path.parents[:2]):
        try:
            return Path(json.loads((directory / "environment.json").read_text())["directory"])
        except (OSError, ValueError, KeyError):
            continue
    return Path()


# An exported model.


def _load_export(path: Path, named: Path | str | None, average: bool | None, cache: Path | None) -> Trained:
    if average:
        raise UserError(f"{path} is an exported model: export it again with --ema instead")
    try:
        values: dict[str, Any] = json.loads((path / CONFIG_FILE).read_bytes())
        config, step, averaged = from_dict(values["config"]), values["step"], values["averaged"]
        mask_token_id = values["mask_token_id"]
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path / CONFIG_FILE}: damaged, or of another version ({said}); copy the exported directory once "
            "more, or export it again with `python -m job.convert export`"
        ) from error
    try:
        if WEIGHTS_KEY in values and not is_file(path / WEIGHTS_FILE, values[WEIGHTS_KEY]):
            raise ValueError(f"{WEIGHTS_FILE} is missing or damaged: SHA-256 differs")
        weights = load_file(path / WEIGHTS_FILE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a whole exported model ({error}); export it again with `python -m job.convert export`"
        ) from error
    data = _on_disk(config, named, cache)
    if (path / DESCRIPTION_FILE).is_file():
        description = read_description(path)
    elif data is not None:
        description = _described_by_data(config, data, weights, path)
    else:
        description = _of_old_export(path, config, weights, mask_token_id)
    directories = [path, data] if data else [path]
    return Trained(path, config, step, weights, averaged, description, directories, data)


def _of_old_export(path: Path, config: Config, weights: dict[str, Tensor], mask_token_id: int) -> ModelDescription:
    """The description of a model that was exported before exports had one: without statistics and encoder."""
    tokenizer = load(str(path / TOKENIZER_FILE)) if (path / TOKENIZER_FILE).is_file() else None
    settings = describe(weights)
    return ModelDescription(
        vocab_size=tokenizer.vocab_size if tokenizer else settings["vocab_size"],
        latent_dim=settings["latent_dim"],
        max_length=settings["max_seq_len"],
        samples=0,
        mask_token_id=mask_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer else 0,
        standardize=config.data.standardize_latents,
        latent_mean=[],
        latent_std=[],
        length_weights=[],
        encoder={},
        tokenizer=TOKENIZER_FILE if tokenizer else None,
        files={TOKENIZER_FILE: file_entry(path / TOKENIZER_FILE)} if tokenizer else {},
    )


# Samples.


def tokenizer_of(dataset: Dataset) -> TextTokenizer | None:
    """The tokenizer of a dataset; None for synthetic data and for data converted without one."""
    return of_dataset(dataset.directory, dataset.info) if isinstance(dataset, ShardDataset) else None


def first_batches(dataset: Dataset, format: BatchFormat, count: int, batch_size: int) -> Iterator[Batch]:
    """The first `count` samples of a split, as an evaluation in one process sees them."""
    return evaluation_batches(dataset, format, num_samples=count, batch_size=batch_size)


def choose_device(name: str) -> torch.device:
    """The device of --device; `auto` takes a GPU where there is one. UserError for `cuda` without one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: no GPU is visible here; use --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")

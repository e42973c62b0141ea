"""A trained model, to be used: from a run directory, one of its checkpoints, or an exported directory.

An exported directory holds all that a program needs of a run, and no data:

    model.safetensors    weights, with the settings that their shapes mean in the header
    config.json          the run's configuration, the step, the mask token, whether the weights are the moving average
    tokenizer.json       absent when the data came without a tokenizer
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from job.config import Config, from_dict, to_dict
from job.data.loader import Batch, BatchFormat, evaluation_batches, open_datasets
from job.data.shards import Dataset, ShardDataset
from job.data.tokenizer import TOKENIZER_FILE, TextTokenizer, load, of_dataset
from job.errors import UserError
from job.files import whole_directory, write_json, write_text, write_whole
from job.model.build import build_model
from job.model.weights import describe, serialize
from job.objective.objective import Objective
from job.runtime.checkpoint import open_checkpoint, read_weights

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass
class Trained:
    """What a run learned, and what is needed to use it."""

    config: Config
    step: int
    weights: dict[str, Tensor]  # on the CPU, by the names of the model's parameters
    averaged: bool  # the weights are the moving average
    mask_token_id: int
    tokenizer: TextTokenizer | None  # None: the data came without one
    validation: Dataset | None  # held-out samples; None: there is no data here

    @property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary, which may be larger than the tokenizer's."""
        return int(describe(self.weights)["vocab_size"])

    @property
    def latent_dim(self) -> int:
        """Dimension of the latents."""
        return int(describe(self.weights)["latent_dim"])

    def objective(self, device: torch.device) -> Objective:
        """The model inside its objective, on a device, in evaluation mode."""
        model = build_model(self.config.model, self.vocab_size, self.latent_dim, seed=0)
        model.load_state_dict(self.weights)
        return Objective(model, self.config, self.mask_token_id).to(device).eval()

    def held_out(self) -> Dataset:
        """The validation split. Raises UserError where there is none."""
        if self.validation is None:
            raise UserError("an exported model comes without data; give a prepared directory with --data DIR")
        return self.validation

    def export(self, out: Path) -> None:
        """Write a directory that `load_trained` reads without the run; it appears whole or not at all.

        UserError where `out` exists.
        """
        # The configuration may leave these to the data, which an export does not have.
        model = replace(self.config.model, vocab_size=self.vocab_size, latent_dim=self.latent_dim)
        description = {
            "step": self.step,
            "averaged": self.averaged,
            "mask_token_id": self.mask_token_id,
            "config": to_dict(replace(self.config, model=model)),
        }
        content = serialize(self.weights, step=str(self.step))
        with whole_directory(out) as partial:
            write_whole(partial / WEIGHTS_FILE, lambda file: file.write(content))
            if self.tokenizer:
                write_text(partial / TOKENIZER_FILE, self.tokenizer.to_json())
            write_json(partial / CONFIG_FILE, description, indent=2)


def load_trained(path: Path, data: Path | None = None, average: bool | None = None) -> Trained:
    """What `path` holds: a run directory, a checkpoint, or a directory written by `python -m job.convert export`.

    `data` replaces the data directory of the run; `average` takes the moving average of the weights (None: where there
    is one). Raises UserError, in one line, when there is no valid checkpoint, no data, or no average.
    """
    if not path.exists():
        raise UserError(f"{path}: no such directory; give a run directory like runs/demo or a checkpoint in it")
    if (path / CONFIG_FILE).is_file():
        return _load_export(path, data, average)
    return _load_checkpoint(path, data, average)


def _load_checkpoint(path: Path, data: Path | None, average: bool | None) -> Trained:
    checkpoint = open_checkpoint(path)
    config = from_dict(checkpoint.record["config"])
    weights = read_weights(checkpoint, "model.")
    averaged = {} if average is False else read_weights(checkpoint, "optimizer.average.")
    if average and not averaged:
        raise UserError(
            f"{checkpoint.path} holds no moving average; leave out --ema, or train with training.ema_decay above 0"
        )
    dataset = _validation(config, data)
    trained = Trained(
        config,
        step=checkpoint.step,
        weights=weights | averaged,  # the average is of parameters only; buffers are the model's
        averaged=bool(averaged),
        mask_token_id=dataset.info.mask_token_id,
        tokenizer=tokenizer_of(dataset),
        validation=dataset,
    )
    _refuse_other_data(trained, dataset, checkpoint.path)
    return trained


def _refuse_other_data(trained: Trained, dataset: Dataset, path: Path) -> None:
    """UserError for data that the model cannot have been trained on."""
    info = dataset.info
    # The model's vocabulary may be larger: it is rounded up to model.vocab_multiple.
    if info.latent_dim != trained.latent_dim or info.vocab_size > trained.vocab_size:
        raise UserError(
            f"--data {trained.config.data.dir}: vocabulary of {info.vocab_size} and latents of {info.latent_dim} "
            f"dimensions do not fit {path}; give the data that the run was trained on"
        )


def _load_export(path: Path, data: Path | None, average: bool | None) -> Trained:
    if average:
        raise UserError(f"{path} is an exported model: export it again with --ema instead")
    try:
        values: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text())
        trained = Trained(
            from_dict(values["config"]),
            step=values["step"],
            weights=load_file(path / WEIGHTS_FILE),
            averaged=values["averaged"],
            mask_token_id=values["mask_token_id"],
            tokenizer=None,
            validation=None,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a whole exported model ({error}); export it again with `python -m job.convert export`"
        ) from error
    if (path / TOKENIZER_FILE).is_file():
        trained.tokenizer = load(str(path / TOKENIZER_FILE))
    if data or trained.config.data.source == "synthetic":
        trained.validation = _validation(trained.config, data)
    return trained


def _validation(config: Config, data: Path | None) -> Dataset:
    """The validation split of a run's data, or of `data` in its place."""
    if data is not None:
        config.data.source, config.data.dir = "shards", str(data)
    elif config.data.source == "shards" and not Path(config.data.dir or "").is_dir():
        raise UserError(f"{config.data.dir}: the run's data directory is not here; name it with --data DIR")
    return open_datasets(config)[1]


def tokenizer_of(dataset: Dataset) -> TextTokenizer | None:
    """The tokenizer of a dataset; None for synthetic data and for data converted without one."""
    return of_dataset(dataset.directory, dataset.info) if isinstance(dataset, ShardDataset) else None


def first_batches(dataset: Dataset, config: Config, count: int, batch_size: int | None = None) -> Iterator[Batch]:
    """The first `count` samples of a split, as an evaluation in one process sees them."""
    size = batch_size or config.training.eval_batch_size
    return evaluation_batches(dataset, BatchFormat.of(config), num_samples=count, batch_size=size)


def choose_device(name: str) -> torch.device:
    """The device of --device; `auto` takes a GPU where there is one. UserError for `cuda` without one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: no GPU is visible here; use --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")

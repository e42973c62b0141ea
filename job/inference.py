"""A trained model for the commands that use one: from a run directory, one of its checkpoints, or an exported directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from job.config import Config, from_dict
from job.data.loader import open_datasets
from job.data.shards import Dataset, ShardDataset
from job.data.tokenizer import TOKENIZER_FILE, TextTokenizer, load, of_dataset
from job.errors import UserError
from job.model.build import build_model
from job.objective.objective import Objective
from job.runtime.checkpoint import open_checkpoint, read_weights

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


@dataclass
class Trained:
    """Weights (CPU tensors by name) and what is needed to use them; `validation` is None where there is no data."""

    config: Config
    step: int
    weights: dict[str, Tensor]
    mask_token_id: int
    validation: Dataset | None
    tokenizer: TextTokenizer | None
    averaged: bool  # the weights are the moving average

    def objective(self, device: torch.device) -> Objective:
        """The model inside the objective, on a device, for evaluation."""
        vocab_size, latent_dim = (
            self.weights["text_head.weight"].shape[0],
            self.weights["latent_head.3.weight"].shape[0],
        )
        model = build_model(self.config.model, vocab_size, latent_dim, seed=0)
        model.load_state_dict(self.weights)
        return Objective(model, self.config, self.mask_token_id).to(device).eval()

    def held_out(self) -> Dataset:
        """The validation split. Raises UserError where there is none."""
        if self.validation is None:
            raise UserError("an exported model comes without data; give a prepared directory with --data DIR")
        return self.validation


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def tokenizer_of(dataset: Dataset) -> TextTokenizer | None:
    """The tokenizer of a dataset; None for synthetic data and for data converted without one."""
    return of_dataset(dataset.directory, dataset.info) if isinstance(dataset, ShardDataset) else None


def load_trained(path: Path, data: Path | None = None, average: bool | None = None) -> Trained:
    """What `path` (run directory, checkpoint, or a directory written by `python -m job.convert export`) holds.

    `data` replaces the data directory of the run; `average` takes the moving average of the weights (None: where there is one).
    Raises UserError, in one line, when there is no valid checkpoint, no data, or no average.
    """
    if not path.exists():
        raise UserError(f"{path}: no such directory; give a run directory like runs/demo or a checkpoint in it")
    return (
        _load_export(path, data, average) if (path / CONFIG_FILE).is_file() else _load_checkpoint(path, data, average)
    )


def _load_checkpoint(path: Path, data: Path | None, average: bool | None) -> Trained:
    checkpoint = open_checkpoint(path)
    config = from_dict(checkpoint.record["config"])
    weights = read_weights(checkpoint, "model.")
    averaged = {} if average is False else read_weights(checkpoint, "optimizer.average.")
    if average and not averaged:
        raise UserError(
            f"{checkpoint.path} holds no moving average; leave out --ema, or train with training.ema_decay above 0"
        )
    weights |= averaged
    dataset = _validation(config, data)
    if (
        dataset.info.latent_dim != weights["latent_head.3.weight"].shape[0]
        or dataset.info.vocab_size > weights["text_head.weight"].shape[0]
    ):
        raise UserError(
            f"--data {config.data.dir}: vocabulary of {dataset.info.vocab_size} and latents of {dataset.info.latent_dim} dimensions do not fit "
            f"{checkpoint.path}; give the data that the run was trained on"
        )
    return Trained(
        config, checkpoint.step, weights, dataset.info.mask_token_id, dataset, tokenizer_of(dataset), bool(averaged)
    )


def _load_export(path: Path, data: Path | None, average: bool | None) -> Trained:
    if average:
        raise UserError(f"{path} is an exported model: export it again with --ema instead")
    try:
        values: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text())
        config, step, mask_token_id = from_dict(values["config"]), values["step"], values["mask_token_id"]
        averaged = values["averaged"]
        weights = load_file(path / WEIGHTS_FILE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a whole exported model ({error}); export it again with `python -m job.convert export`"
        ) from error
    dataset = _validation(config, data) if data or config.data.source == "synthetic" else None
    tokenizer = load(str(path / TOKENIZER_FILE)) if (path / TOKENIZER_FILE).is_file() else None
    return Trained(config, step, weights, mask_token_id, dataset, tokenizer, averaged)


def _validation(config: Config, data: Path | None) -> Dataset:
    if data is not None:
        config.data.source, config.data.dir = "shards", str(data)
    elif config.data.source == "shards" and not Path(config.data.dir or "").is_dir():
        raise UserError(f"{config.data.dir}: the run's data directory is not here; name it with --data DIR")
    return open_datasets(config)[1]

"""Where a run's weights come from, and what its model knows of its data because of that.

A model knows latents as they were standardized when it was first trained. A run that goes on from a checkpoint, or
starts from the weights that training.init_from names, keeps that standardization, whatever data it reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from job.config import Config, from_dict
from job.data.description import (
    DIRECTORY,
    ModelDescription,
    describe_dataset,
    from_values,
    refuse_other_data,
    with_model_of,
)
from job.data.shards import Dataset, ShardDataset
from job.errors import UserError
from job.model.weights import WEIGHTS_FILE, load_weights, read_header
from job.runtime.checkpoint import Checkpoint
from job.trained import RECORD_KEY, described, open_data, open_saved, run_directory, weights_of


@dataclass
class InitialWeights:
    """What training.init_from names: weights, and the description of the data that they were trained on."""

    path: Path
    weights: dict[str, Tensor]
    description: ModelDescription | None  # None: of a weight file or a checkpoint that does not say
    directories: list[Path]  # where the description's files may be


def load_initial(config: Config) -> InitialWeights | None:
    """Weights of the run, checkpoint, exported model or weight file that training.init_from names; None without one.

    Of a run the moving average is taken where there is one. UserError, in one line, when there are no weights.
    """
    if config.training.init_from is None:
        return None
    path = Path(config.training.init_from)
    if path.is_file() or (path / WEIGHTS_FILE).is_file() or not path.exists():
        weights, _ = load_weights(path)
        values = read_header(path).get(RECORD_KEY)
        description = from_values(json.loads(values), path) if values else None
        return InitialWeights(path, weights, description, [path.parent if path.is_file() else path])
    checkpoint = open_saved(path)
    directories = [run_directory(checkpoint.path) / DIRECTORY]
    return InitialWeights(
        path, weights_of(checkpoint)[0], described(checkpoint) or _by_its_data(checkpoint), directories
    )


def _by_its_data(checkpoint: Checkpoint) -> ModelDescription | None:
    """The description, by its run's data, of a checkpoint from before checkpoints had one; None where that is gone."""
    config = from_dict(checkpoint.record["config"])
    try:
        data, _ = open_data(config, None, checkpoint.path)
    except UserError:
        return None
    return describe_dataset(data, config.data.standardize_latents)


def describe_run(
    config: Config,
    data: Dataset,
    checkpoint: Checkpoint | None,
    initial: InitialWeights | None,
    say: Callable[[str], None],
) -> ModelDescription:
    """What a run's model takes along of its data, with the statistics by which its latents are standardized.

    They are those of the checkpoint or of the weights that it starts from, where these say them, else the data's own.
    Raises UserError for data of another width, tokenizer or encoder than those weights were trained on.
    """
    origin, name = None, ""
    if checkpoint is not None:
        origin, name = described(checkpoint), str(checkpoint.path)
        if origin is not None and checkpoint.record["data"] == data.fingerprint:
            return origin
    elif initial is not None:
        origin, name = initial.description, str(initial.path)
    own = describe_dataset(data, config.data.standardize_latents)
    if origin is None:
        if initial is not None and own.standardize:
            say(f"note: {name} does not say how its latents were standardized; the data's own statistics are taken")
        return own
    if origin.standardize != own.standardize:
        raise UserError(
            f"data.standardize_latents={str(own.standardize).lower()}, but {name} was trained with "
            f"data.standardize_latents={str(origin.standardize).lower()}; use the same"
        )
    for note in refuse_other_data(origin, data.info, (name, config.data.dir or "the synthetic data")):
        say(f"note: {note}")
    return with_model_of(own, origin)


def sources(data: Dataset, initial: InitialWeights | None) -> list[Path]:
    """Directories where the tokenizer and the encoder of a run's model may be."""
    of_data = [data.directory] if isinstance(data, ShardDataset) else []
    return of_data + (initial.directories if initial else [])

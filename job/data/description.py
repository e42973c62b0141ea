"""What a model must know of the data it was trained on, to be used without it.

A run carries it in RUN/model/, an exported directory beside its weights:

    model.json             ModelDescription
    tokenizer.json         absent when the data came without one
    encoder.safetensors    the fitted encoder, where the data has one (`--encoder lsa`)

The content of model.json also stands in every checkpoint's record and in the header of exported weights, so that these
know at least their statistics and the hashes of their tokenizer and encoder wherever they are copied to.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from job import checkpoint_names
from job.data.encoders import ENCODER_FILE, GIVEN
from job.data.lengths import LENGTH_SAMPLES, fit_lengths
from job.data.shards import INFO_FILE, Dataset, DatasetInfo
from job.data.tokenizer import TextTokenizer, saved
from job.errors import UserError
from job.files import file_entry, write_json, write_whole
from job.row_kinds import PAIRED

FORMAT_VERSION = 1
DIRECTORY = "model"  # below the run directory
DESCRIPTION_FILE = "model.json"
SHOWN_DIGITS = 12  # of a hash, in messages


@dataclass(frozen=True)
class ModelDescription:
    """The part of a dataset's description that belongs to a model, and how its latents are standardized."""

    vocab_size: int  # of the data; the model's may be larger
    latent_dim: int
    max_length: int  # tokens of the longest row
    samples: int  # training rows
    mask_token_id: int
    pad_token_id: int
    standardize: bool  # the model's latents are (raw - latent_mean) / latent_std
    latent_mean: list[float]  # [D]; empty in a model that was exported before exports had statistics
    latent_std: list[float]  # [D]
    length_weights: list[float]  # [D + 1], of job.data.lengths.predicted_lengths; empty where they are not known
    encoder: dict[str, Any]  # as dataset.json describes it
    tokenizer: str | None  # file name; its hash is in `files`
    files: dict[str, dict[str, Any]]  # name -> {sha256, bytes}, of the tokenizer and the encoder
    format_version: int = FORMAT_VERSION

    @property
    def tokenizer_hash(self) -> str | None:
        """SHA-256 of the tokenizer's file; None without a tokenizer."""
        return self.files[self.tokenizer]["sha256"] if self.tokenizer else None


def describe_dataset(train: Dataset, standardize: bool) -> ModelDescription:
    """The description of a model that is trained on a training split."""
    info = train.info
    rows = np.arange(min(LENGTH_SAMPLES, info.rows_of_kinds("train")[PAIRED]))
    latents = np.stack([train[int(row)][1] for row in rows])
    return ModelDescription(
        vocab_size=info.vocab_size,
        latent_dim=info.latent_dim,
        max_length=info.max_length,
        samples=len(train),
        mask_token_id=info.mask_token_id,
        pad_token_id=info.pad_token_id,
        standardize=standardize,
        latent_mean=info.latent_mean,
        latent_std=info.latent_std,
        length_weights=fit_lengths(latents, train.lengths(rows)),
        encoder=info.encoder,
        tokenizer=info.tokenizer,
        files={name: entry for name, entry in info.files.items() if name in (info.tokenizer, ENCODER_FILE)},
    )


def with_model_of(own: ModelDescription, origin: ModelDescription) -> ModelDescription:
    """The description of a model that goes on, or starts, from the weights of `origin` with other data of its kind.

    The weights know latents as `origin` standardized them. So its statistics stay: with those of the new data every
    latent would be moved, and the model would have to learn first where they went.
    """
    return dataclasses.replace(
        own,
        latent_mean=origin.latent_mean,
        latent_std=origin.latent_std,
        encoder=origin.encoder,
        files=origin.files | own.files,
    )


# Written and read.


def to_values(description: ModelDescription) -> dict[str, Any]:
    """The description as plain values, for JSON."""
    return dataclasses.asdict(description)


def from_values(values: Mapping[str, Any], where: Path) -> ModelDescription:
    """What `to_values` made, read from `where`. UserError when it is damaged or of a newer version."""
    try:
        if values["format_version"] == FORMAT_VERSION:
            return ModelDescription(**values)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: damaged, or not a model's description ({error!r})") from error
    raise UserError(
        f"{where}: format_version {values['format_version']} of a model's description, this version reads "
        f"{FORMAT_VERSION}"
    )


def read_description(directory: Path) -> ModelDescription:
    """The description in a directory that `write_model_files` wrote. UserError when it is missing or damaged."""
    path = directory / DESCRIPTION_FILE
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read, or damaged ({error})") from error
    return from_values(values, path)


def write_model_files(directory: Path, description: ModelDescription, sources: Sequence[Path]) -> None:
    """Write model.json, tokenizer and encoder into a directory.

    The files come from the first source that has them; those that are there already are left alone. UserError when no
    source has the tokenizer.
    """
    for name, entry in description.files.items():
        if is_file(directory / name, entry):
            continue
        found = find_file(name, entry, sources)
        if found is not None:
            write_whole(directory / name, partial(_copy, found))
        elif name == description.tokenizer:
            looked = ", ".join(map(str, sources)) or "no directory"
            raise UserError(f"{name}: not found in {looked}, or changed since; name the run's data with --data DIR")
    write_json(directory / DESCRIPTION_FILE, to_values(description), indent=1)


def _copy(source: Path, target: BinaryIO) -> None:
    with source.open("rb") as file:
        shutil.copyfileobj(file, target)


def is_file(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is there and is the one that a description lists."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and file_entry(path) == entry


def find_file(name: str, entry: Mapping[str, Any], directories: Sequence[Path]) -> Path | None:
    """The first directory's file of this name that is the one listed; None when no directory has it."""
    return next((d / name for d in directories if is_file(d / name, entry)), None)


def find_tokenizer(description: ModelDescription, directories: Sequence[Path]) -> TextTokenizer | None:
    """The tokenizer of a model, from the first directory that has it; None when none has."""
    name = description.tokenizer
    path = find_file(name, description.files[name], directories) if name else None
    return saved(path, description.mask_token_id, description.pad_token_id) if path else None


def description_of(path: Path) -> Path:
    """The directory with tokenizer, encoder and description of a run, a checkpoint, an export or a prepared dataset.

    The description is model.json, for a dataset dataset.json. UserError when there is none of them.
    """
    run = path.parent.parent if path.parent.name == checkpoint_names.DIRECTORY else path
    for directory, file in ((path, DESCRIPTION_FILE), (path, INFO_FILE), (run / DIRECTORY, DESCRIPTION_FILE)):
        if (directory / file).is_file():
            return directory
    if not path.exists():
        raise UserError(f"{path}: no such directory; give a run, an exported model or a prepared dataset")
    raise UserError(
        f"{path}: no run, exported model or prepared dataset that carries its tokenizer and encoder "
        f"(neither {DIRECTORY}/{DESCRIPTION_FILE} nor {INFO_FILE} is here); give the data that it was trained on"
    )


# Whether data belongs to a model.


def refuse_other_data(model: ModelDescription, data: DatasetInfo, names: tuple[str, str]) -> list[str]:
    """Refuse data that a model cannot read: of another width, tokenizer or encoder. Returns notes.

    `names` are those of the model and of the data, for the messages. Raises UserError.
    """
    of_model, of_data = names
    if data.latent_dim != model.latent_dim:
        raise UserError(
            f"latents of {data.latent_dim} dimensions in {of_data} do not fit {of_model}, which has {model.latent_dim}"
        )
    _refuse_other_tokenizer(model, data, names)
    if not same_encoder(model.encoder, data.encoder):
        if model.encoder.get("name") == data.encoder.get("name") == GIVEN:
            # Every file of given latents has another hash, whatever made them: only the user can know.
            note = (
                f"the latents of {of_data} and of {of_model} were given in different files; "
                "see to it that one encoder made both"
            )
            return [note, *_other_statistics(model, data, names)]
        raise UserError(
            f"the latents of {of_data} are of another encoder ({encoder_words(data.encoder)}) than those of {of_model} "
            f"({encoder_words(model.encoder)}); prepare the texts with `python -m job.prepare --like`"
        )
    return _other_statistics(model, data, names)


def _refuse_other_tokenizer(model: ModelDescription, data: DatasetInfo, names: tuple[str, str]) -> None:
    of_model, of_data = names
    theirs = data.files[data.tokenizer]["sha256"] if data.tokenizer else None
    ours = model.tokenizer_hash
    if ours and theirs and ours != theirs:
        raise UserError(
            f"the tokens of {of_data} are of another tokenizer (SHA-256 {theirs[:SHOWN_DIGITS]}, {data.vocab_size} "
            f"tokens) than those of {of_model} (SHA-256 {ours[:SHOWN_DIGITS]}, {model.vocab_size} tokens); "
            "prepare the texts with `python -m job.prepare --like`"
        )
    # Converted data may come without a tokenizer; then only the numbers can be compared.
    if data.vocab_size > model.vocab_size or data.mask_token_id != model.mask_token_id:
        raise UserError(
            f"a vocabulary of {data.vocab_size} with mask token {data.mask_token_id} in {of_data} does not fit "
            f"{of_model}, whose data had {model.vocab_size} with mask token {model.mask_token_id}"
        )


def same_encoder(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of one encoder: by content hash where both have one, else by all that both say.

    A precision and a place on some machine are no difference: an encoder gives nearly the same latents in another one.
    """
    if "sha256" in one and "sha256" in other:
        return bool(one["sha256"] == other["sha256"])
    common = (one.keys() & other.keys()) - {"dtype", "directory", "sha256"}
    return all(one[name] == other[name] for name in common)


def encoder_words(encoder: Mapping[str, Any]) -> str:
    """An encoder's description for a message."""
    shown = {name: value[:SHOWN_DIGITS] if name == "sha256" else value for name, value in encoder.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None and name != "directory")


def _other_statistics(model: ModelDescription, data: DatasetInfo, names: tuple[str, str]) -> list[str]:
    """A note when the latents of the data have other statistics than the model standardizes with."""
    if not model.standardize or not model.latent_mean:
        return []
    mean, std = np.array(model.latent_mean), np.array(model.latent_std)
    moved = float(np.abs((np.array(data.latent_mean) - mean) / std).max())
    ratios = np.array(data.latent_std) / std
    if moved == 0 and (ratios == 1).all():
        return []
    of_model, of_data = names
    return [
        f"latents of {of_data} have other statistics than those of {of_model} (means differ by up to {moved:.2g} "
        f"standard deviations, these by a factor of {ratios.min():.2g} to {ratios.max():.2g}); "
        f"they are standardized with those of {of_model}"
    ]

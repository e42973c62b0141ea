"""From the texts of a shard to its rows, a chunk of texts after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from job.data import tokenizer as tokenizers
from job.data.console import CountedWork
from job.data.encoders import Encoder, Resources, load_encoder
from job.data.fitting import chunks, fits
from job.data.work import TextShard
from job.files import write_whole


@dataclass
class Encoded:
    """Token rows, int64 [L] each, and latents, float32 [rows, D], of a shard's texts."""

    rows: list[np.ndarray]
    latents: np.ndarray
    without_latent: int  # texts left out since their latent is zero


class LoadedWhenNeeded:
    """A dataset's encoder, loaded for the first text whose latent is not there already."""

    def __init__(self, directory: Path, description: dict[str, Any], resources: Resources) -> None:
        self.directory, self.description, self.resources = directory, description, resources
        self._encoder: Encoder | None = None

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), D]. UserError when the encoder is not at hand."""
        self._encoder = self._encoder or load_encoder(self.directory, self.description, self.resources)
        return self._encoder.encode(texts)


class KeptLatents:
    """The latents of an unfinished shard, written a chunk at a time, so that a killed process encodes no chunk twice.

    Only whole chunks: a text's last bits depend on the texts that are encoded with it.
    """

    def __init__(self, shard: TextShard) -> None:
        self.shard = shard

    def encode(self, encoder: Encoder, number: int, texts: Sequence[str]) -> np.ndarray:
        """The latents float32 [len(texts), D] of a chunk, from its file if there is one."""
        path = self.shard.chunk_file(number)
        if path.is_file():
            found: np.ndarray = np.load(path, allow_pickle=False)
            return found
        latents = encoder.encode(texts)
        write_whole(path, partial(_save, latents))
        return latents

    def remove(self) -> None:
        """Delete the files, once the shard is written."""
        for path in self.shard.work.glob(self.shard.chunk_file("*").name):
            path.unlink()


def _save(array: np.ndarray, file: BinaryIO) -> None:
    np.save(file, array, allow_pickle=False)


def encode_shard(
    texts: Sequence[str],
    tokenizer: tokenizers.TextTokenizer,
    encoder: Encoder,
    max_length: int,
    work: CountedWork,
    kept: KeptLatents | None = None,
) -> Encoded:
    """The texts that fit into `max_length` tokens and have a latent.

    Longer texts are dropped. Cut instead, a text would have the latent of words that are not there, and two texts
    that differ behind the cut could become one row in both splits. A text of which the encoder knows nothing is
    dropped too: its latent, zero, would be paired with any such text.
    """
    rows: list[np.ndarray] = []
    latents: list[np.ndarray] = []
    without_latent = 0
    for number, chunk in enumerate(chunks(texts)):
        tokens = tokenizer.encode(chunk)
        fitting = [index for index, row in enumerate(tokens) if fits(row, max_length)]
        if fitting:
            chosen = [chunk[index] for index in fitting]
            found = kept.encode(encoder, number, chosen) if kept else encoder.encode(chosen)
            known = (found != 0).any(axis=1)
            rows += [tokens[index] for index, is_known in zip(fitting, known, strict=True) if is_known]
            latents.append(found[known])
            without_latent += int((~known).sum())
        work.add(len(chunk))
    if not latents:  # a shard of long texts alone still has latents of the right dimension
        latents.append(encoder.encode(texts[:1])[:0].astype(np.float32))
    return Encoded(rows, np.concatenate(latents), without_latent)

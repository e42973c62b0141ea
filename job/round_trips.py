"""Texts through a trained model and back: what `python -m job.sample` prints and a run writes at its end.

The model does not choose how long a text is: what is decoded has as many tokens as the text that its latent belongs to,
so every function here takes a mask of rows and positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from job.data.loader import BatchFormat
from job.data.shards import Dataset
from job.data.tokenizer import TextTokenizer
from job.files import write_text
from job.objective.objective import Objective
from job.objective.sampling import generate
from job.trained import first_batches, tokenizer_of


@dataclass(frozen=True)
class Decoding:
    """How texts and latents are made: passes per direction, temperature of the tokens, seed of the noise.

    The defaults are the one-shot form that cycle_vae trains, with the likeliest tokens.
    """

    steps: int = 1
    temperature: float = 0.0
    seed: int = 0


ONE_SHOT = Decoding()


@dataclass(frozen=True)
class RoundTrip:
    """A text, and what comes back: from its true latent (None where that is unknown), and from its predicted one."""

    text: str
    from_latent: str | None
    from_text: str


def decode_latents(
    objective: Objective, latent: Tensor, mask: Tensor, decoding: Decoding, numbers: Tensor | None = None
) -> Tensor:
    """L2T: tokens [B, S] from standardized latents [B, D], of the lengths in mask [B, S].

    With a temperature, `numbers` [B] are those by which the rows' draws are made (None: 0, 1, ...).
    """
    tokens, _ = generate(
        objective,
        mask,
        latent=latent,
        steps=decoding.steps,
        temperature=decoding.temperature,
        seed=decoding.seed,
        numbers=numbers,
    )
    return tokens


def encode_texts(objective: Objective, tokens: Tensor, mask: Tensor, decoding: Decoding) -> Tensor:
    """T2L: standardized latents [B, D] predicted from tokens [B, S].

    All rows start from the same noise. So a text has one latent, whatever its place among others.
    """
    same = torch.zeros(len(mask), dtype=torch.int64)
    _, latent = generate(objective, mask, tokens=tokens, steps=decoding.steps, seed=decoding.seed, numbers=same)
    return latent


def text_to_text(objective: Objective, tokens: Tensor, mask: Tensor, decoding: Decoding) -> Tensor:
    """T2L2T: tokens [B, S] decoded from the latents predicted from tokens [B, S]."""
    return decode_latents(objective, encode_texts(objective, tokens, mask, decoding), mask, decoding)


def padded(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows of different lengths as one batch: tokens [B, S], and mask [B, S], True on real tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    tokens = torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row))) for row in rows]))
    return tokens.to(device), length_mask(lengths).to(device)


def length_mask(lengths: Tensor) -> Tensor:
    """Mask [B, S] of rows of `lengths` [B] tokens, True on real tokens."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def as_texts(tokenizer: TextTokenizer | None, rows: Tensor, mask: Tensor) -> list[str]:
    """Texts of token rows [B, S]; the token ids themselves without a tokenizer."""
    kept = [row[real].tolist() for row, real in zip(rows.cpu(), mask.cpu(), strict=True)]
    return [tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids)) for ids in kept]


def round_trips(
    objective: Objective,
    dataset: Dataset,
    format: BatchFormat,
    count: int,
    batch_size: int,
    decoding: Decoding = ONE_SHOT,
) -> list[RoundTrip]:
    """The first `count` texts of a dataset, decoded from their latents and from the latents predicted from them."""
    device, was_training = next(objective.parameters()).device, objective.training
    tokenizer = tokenizer_of(dataset)
    trips: list[RoundTrip] = []
    objective.eval()  # no dropout; the caller may be in the middle of training, so its mode comes back below
    for batch in first_batches(dataset, format, count, batch_size):
        tokens, mask, latent = (batch[name].to(device) for name in ("input_ids", "attention_mask", "latent"))
        texts = as_texts(tokenizer, tokens, mask)
        from_latents = as_texts(tokenizer, decode_latents(objective, latent, mask, decoding), mask)
        from_texts = as_texts(tokenizer, text_to_text(objective, tokens, mask, decoding), mask)
        trips += [RoundTrip(*trip) for trip in zip(texts, from_latents, from_texts, strict=True)]
    objective.train(was_training)
    return trips


def as_paragraphs(trips: Iterable[RoundTrip]) -> str:
    """Round trips as text, a paragraph each."""
    paragraphs = []
    for trip in trips:
        lines = [f"text   {trip.text}"]
        if trip.from_latent is not None:
            lines.append(f"L2T    {trip.from_latent}")
        lines.append(f"T2L2T  {trip.from_text}")
        paragraphs.append("\n".join(lines) + "\n")
    return "\n".join(paragraphs)


def write_samples(path: Path, trips: Iterable[RoundTrip]) -> None:
    """Write round trips to a file, whole or not at all."""
    write_text(path, as_paragraphs(trips))

"""Texts through a trained model and back: what `python -m job.sample` prints and a run writes at its end.

The model does not choose how long a text is: what is decoded has as many tokens as the text that its latent belongs to,
so every function here takes a mask of rows and positions.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from job.config import Config, DecodingConfig
from job.data.loader import BatchFormat
from job.data.shards import Dataset
from job.data.tokenizer import TextTokenizer
from job.data.unicode_names import named_character
from job.files import write_text
from job.objective.cycle_decoding import decode, encode
from job.objective.objective import Objective
from job.objective.sampling import ONE_PASS
from job.objective.text_scores import TextScoring
from job.trained import first_batches, tokenizer_of


@dataclass(frozen=True)
class RoundTrip:
    """A text, and what comes back: from its true latent (None where that is unknown), and from its predicted one."""

    text: str
    from_latent: str | None
    from_text: str

    def record(self) -> dict[str, str | None]:
        """As an object of samples.jsonl."""
        return {"text": self.text, "l2t": self.from_latent, "t2l2t": self.from_text}

    def shortened(self, width: int) -> RoundTrip:
        """The same with the first words of each text, at most `width` characters of them on one line."""

        def short(text: str) -> str:
            return textwrap.shorten(text, width, placeholder=" ...")

        from_latent = None if self.from_latent is None else short(self.from_latent)
        return RoundTrip(short(self.text), from_latent, short(self.from_text))


def text_scoring(config: Config, tokenizer: TextTokenizer | None) -> TextScoring:
    """How evaluations make texts and read them, by a configuration."""
    count = config.logging.num_generated
    if tokenizer is None:
        # Ids stand for the words, as in samples.txt.
        return TextScoring(config.decoding, count, detokenize=lambda ids: " ".join(map(str, ids)))
    return TextScoring(config.decoding, count, tokenizer.special_token_ids, tokenizer.decode)


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
    decoding: DecodingConfig = ONE_PASS,
    seed: int = 0,
) -> list[RoundTrip]:
    """The first `count` texts of a dataset, decoded from their latents and from the latents predicted from them."""
    device, was_training = next(objective.parameters()).device, objective.training
    tokenizer = tokenizer_of(dataset)
    trips: list[RoundTrip] = []
    objective.eval()  # no dropout; the caller may be in the middle of training, so its mode comes back below
    for batch in first_batches(dataset, format, count, batch_size):
        tokens, mask, latent = (batch[name].to(device) for name in ("input_ids", "attention_mask", "latent"))
        numbers = batch["position"].cpu()
        predicted = encode(objective, tokens, mask, decoding, seed)
        columns = (
            as_texts(tokenizer, tokens, mask),
            as_texts(tokenizer, decode(objective, latent, mask, decoding, seed, numbers), mask),
            as_texts(tokenizer, decode(objective, predicted, mask, decoding, seed, numbers), mask),
        )
        trips += [RoundTrip(*trip) for trip in zip(*columns, strict=True)]
    objective.train(was_training)
    return trips


def as_paragraphs(trips: Iterable[RoundTrip]) -> str:
    """Round trips as text, a paragraph each.

    Where the text is the name of a character, the characters that the lines name stand beside them.
    """
    paragraphs = []
    for trip in trips:
        lines = {"text": trip.text, "L2T": trip.from_latent, "T2L2T": trip.from_text}
        shown = {kind: text for kind, text in lines.items() if text is not None}
        if named_character(trip.text):
            width = max(len(text) for text in shown.values())
            shown = {kind: f"{text:<{width}}  {named_character(text) or ''}" for kind, text in shown.items()}
        paragraphs.append("".join(f"{kind:<6} {text}".rstrip() + "\n" for kind, text in shown.items()))
    return "\n".join(paragraphs)


def write_samples(path: Path, trips: Iterable[RoundTrip]) -> None:
    """Write round trips to a file, whole or not at all."""
    write_text(path, as_paragraphs(trips))

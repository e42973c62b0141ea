"""`--dry-run`: what a preparation would read, keep and drop. Nothing is left of it, and no encoder runs.

The texts are sorted in a directory for temporary files, as a preparation sorts them in its own.
"""

from __future__ import annotations

import tempfile
import textwrap
from array import array
from pathlib import Path

import numpy as np

from job.data import tokenizer as tokenizers
from job.data.encoders import GIVEN
from job.data.fitting import CHUNK, fits
from job.data.given import GivenLatents
from job.data.like import Pattern
from job.data.options import LocalOptions, Options
from job.data.reading import part_of, read_into, refuse_empty
from job.data.remote import fetch
from job.data.splitting import PARTS, TRAIN, UNPAIRED, VALIDATION, Division
from job.data.text_store import KeptText, TextStore

EXAMPLES = 5
SHOWN_CHARACTERS = 100  # of an example
QUANTILES = {"shortest": 0.0, "median": 0.5, "95%": 0.95, "99%": 0.99, "longest": 1.0}


def preview(options: Options, local: LocalOptions, pattern: Pattern | None) -> str:
    """An account of the texts. UserError for all that a preparation would refuse in them."""
    tokenizer = _tokenizer(options, local, pattern)
    with tempfile.TemporaryDirectory() as directory:
        given = None
        if options.encoder == GIVEN:
            latents = options.latents
            file = fetch(latents, "--latents", Path(directory) / "latents.npy") if latents else None
            given = GivenLatents(options, file)
        seen = _Seen(options, tokenizer, given)
        with TextStore(Path(directory)) as store:
            read_into(store, options, given)
            for text in store.in_order():
                seen.add(text)
            seen.flush()
    refuse_empty(options, seen.counts, store.duplicates)
    return "\n".join(seen.lines(store.rows, store.duplicates))


class _Seen:
    """Counts and lengths of the texts, and a few of them."""

    def __init__(
        self, options: Options, tokenizer: tokenizers.TextTokenizer | None, given: GivenLatents | None
    ) -> None:
        self.counts = dict.fromkeys(PARTS, 0)
        self.examples: list[str] = []
        self._options, self._tokenizer, self._given = options, tokenizer, given
        self._division = Division(options.validation_fraction, options.encode_fraction)
        self._characters, self._tokens = array("q"), array("q")
        self._too_long = 0
        self._zero = 0  # texts that fit whose latent is zero
        self._waiting: list[tuple[str, KeptText]] = []  # and its part

    def add(self, text: KeptText) -> None:
        part = part_of(text, self._division)
        self.counts[part] += 1
        self._characters.append(len(text.text))
        if part == TRAIN and len(self.examples) < EXAMPLES:
            self.examples.append(" ".join(text.text.split()))
        self._waiting.append((part, text))
        if len(self._waiting) == CHUNK:
            self.flush()

    def flush(self) -> None:
        """Look at the texts that wait for their chunk to be full."""
        waiting, self._waiting = self._waiting, []
        if self._tokenizer:
            rows = self._tokenizer.encode([text.text for _, text in waiting])
            self._tokens.extend(map(len, rows))
            waiting = [item for item, row in zip(waiting, rows, strict=True) if fits(row, self._options.max_length)]
            self._too_long += len(rows) - len(waiting)
        numbers = [text.number for part, text in waiting if part != UNPAIRED]
        if self._given and numbers:
            self._zero += self._given.zero_count(numbers)

    def lines(self, rows: int, duplicates: int) -> list[str]:
        """The account."""
        without = self.counts[UNPAIRED]
        more = f", {without} more training texts without latents" if without else ""
        split = f"{self.counts[TRAIN]} training and {self.counts[VALIDATION]} validation texts{more}"
        lines = [
            f"{rows} texts read, {rows - duplicates} different ones; nothing was written",
            f"  split        {split}",
            f"  characters   {_spread(self._characters)}",
        ]
        dropped = [f"{duplicates} duplicates"]
        if self._tokenizer:
            lines.append(f"  tokens       {_spread(self._tokens)}")
            dropped.append(f"{self._too_long} longer than --max-length {self._options.max_length}")
        else:
            lines.append(
                "  tokens       not known before the tokenizer is trained, nor what is longer than --max-length"
            )
        if self._given:
            dropped += [f"{self._zero} whose latent is zero", f"{self._given.empty} empty"]
            lines.append(f"  latents      {self._given.width} dimensions, given")
        lines.append(f"  dropped      {', '.join(dropped)}")
        shown = [textwrap.shorten(text, SHOWN_CHARACTERS, placeholder="...") for text in self.examples]
        return [*lines, *(f"  for example  {text}" for text in shown)]


def _tokenizer(options: Options, local: LocalOptions, pattern: Pattern | None) -> tokenizers.TextTokenizer | None:
    """The tokenizer, if it is not one to be trained."""
    if pattern:
        return pattern.read_tokenizer()
    if options.tokenizer == "train":
        return None
    return tokenizers.load(
        str(options.tokenizer),
        local_files_only=local.local_files_only,
        mask_token=options.mask_token,
        pad_token=options.pad_token,
    )


def _spread(numbers: array[int]) -> str:
    """Where the numbers lie, in words."""
    sizes = np.frombuffer(numbers, np.int64)
    values = np.quantile(sizes, list(QUANTILES.values()), method="nearest")
    shown = [f"{name} {value}" for name, value in zip(QUANTILES, values.tolist(), strict=True)]
    return f"{sizes.sum()} in all; {', '.join(shown)}"

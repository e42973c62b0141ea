"""`--dry-run`: what a preparation would read, keep and drop. Nothing is written, and no encoder runs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

from job.data import tokenizer as tokenizers
from job.data.encoders import GIVEN
from job.data.fitting import chunks
from job.data.given import GivenLatents
from job.data.like import Pattern
from job.data.options import LocalOptions, Options
from job.data.reading import read_splits

EXAMPLES = 5
SHOWN_CHARACTERS = 100  # of an example
QUANTILES = {"shortest": 0.0, "median": 0.5, "95%": 0.95, "99%": 0.99, "longest": 1.0}


def preview(options: Options, local: LocalOptions, pattern: Pattern | None) -> str:
    """An account of the texts. UserError for all that a preparation would refuse in them."""
    tokenizer = _tokenizer(options, local, pattern)
    given = GivenLatents(options) if options.encoder == GIVEN else None
    splits = read_splits(options, given)
    with_latent = [text for texts in splits.of_split.values() for text in texts]
    texts = [*with_latent, *splits.unpaired]
    train, validation = splits.of_split["train"], splits.of_split["validation"]
    without = f", {len(splits.unpaired)} more training texts without latents" if splits.unpaired else ""
    lines = [
        f"{len(texts) + splits.duplicates} texts read, {len(texts)} different ones; nothing was written",
        f"  split        {len(train)} training and {len(validation)} validation texts{without}",
        f"  characters   {_spread([len(text) for text in texts])}",
    ]
    dropped = [f"{splits.duplicates} duplicates"]
    if tokenizer:
        lengths = [len(row) for chunk in chunks(texts) for row in tokenizer.encode(chunk)]
        fitting = [text for text, length in zip(texts, lengths, strict=True) if 0 < length <= options.max_length]
        kept = set(fitting)
        with_latent = [text for text in with_latent if text in kept]
        lines.append(f"  tokens       {_spread(lengths)}")
        dropped.append(f"{len(texts) - len(fitting)} longer than --max-length {options.max_length}")
    else:
        lines.append("  tokens       not known before the tokenizer is trained, nor what is longer than --max-length")
    if given:
        dropped += [f"{given.zero_count(with_latent)} whose latent is zero", f"{given.empty} empty"]
        lines.append(f"  latents      {given.width} dimensions, given")
    lines.append(f"  dropped      {', '.join(dropped)}")
    shown = [" ".join(text.split()) for text in train[:EXAMPLES]]
    lines += [f"  for example  {textwrap.shorten(text, SHOWN_CHARACTERS, placeholder='...')}" for text in shown]
    return "\n".join(lines)


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


def _spread(numbers: Sequence[int]) -> str:
    """Where the numbers lie, in words."""
    values = np.quantile(numbers, list(QUANTILES.values()), method="nearest")
    shown = [f"{name} {value}" for name, value in zip(QUANTILES, values.tolist(), strict=True)]
    return f"{sum(numbers)} in all; {', '.join(shown)}"

"""What programs give to a model (job.api): checked, and in the types that it computes with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike

from job.errors import UserError


def whole_number(name: str, value: object, least: int | None = None) -> int:
    """The value of an option that is a whole number, numpy's ones too. UserError for another one, and below `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name}={value!r}: give a whole number")
    if least is not None and value < least:
        raise UserError(f"{name}={value}: give at least {least}")
    return int(value)


def real_number(name: str, value: object) -> float:
    """The value of an option that is any number. UserError for another one."""
    # Of numpy's numbers only float64 is a float, but all are Real; so is bool.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name}={value!r}: give a number")
    return float(value)


def list_of_texts(texts: Iterable[str]) -> list[str]:
    """Texts as a list. UserError for a single one, and for what is no text, such as the NaN of a table's empty cell."""
    if isinstance(texts, str):
        raise UserError("give a list of texts, not a single one")
    if not isinstance(texts, Iterable):
        raise UserError(f"give a list of texts, not {texts!r}")
    listed = list(texts)
    for number, text in enumerate(listed, 1):
        if not isinstance(text, str):
            raise UserError(f"text {number} is {text!r}, not a string")
    return listed


def token_ids(rows: Iterable[ArrayLike], longest: int, vocab_size: int) -> list[np.ndarray]:
    """Token ids as int64 [L] each. UserError when they are no such thing, or none of the vocabulary."""
    checked = []
    for number, row in enumerate(rows, 1):
        ids = np.asarray(row)
        if ids.ndim != 1 or not 0 < len(ids) <= longest:
            raise UserError(f"row {number}: of shape {list(ids.shape)}; give 1 to {longest} token ids")
        if ids.dtype.kind not in "iu":
            raise UserError(f"row {number}: token ids are whole numbers, not {ids.dtype}")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise UserError(f"row {number}: token ids lie between 0 and {vocab_size - 1}")
        checked.append(ids.astype(np.int64))
    return checked


def raw_latents(latents: ArrayLike, dimension: int) -> np.ndarray:
    """Latents as float32 [N, D]. UserError when they are no such thing, or not finite."""
    try:
        raw = np.array(latents, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"latents are not rows of numbers of one length ({error})") from error
    if raw.shape == (0,):
        return np.empty((0, dimension), np.float32)
    if raw.ndim != 2 or raw.shape[1] != dimension:
        raise UserError(f"latents of shape {list(raw.shape)}; this model takes [N, {dimension}]")
    bad = np.flatnonzero(~np.isfinite(raw).all(1))
    if len(bad):
        raise UserError(f"latent {bad[0] + 1} holds a number that is not finite")
    return raw


def counts_of_tokens(lengths: int | Sequence[int] | np.ndarray, texts: int, longest: int) -> np.ndarray:
    """Token counts, int64 [N], of so many texts, from one number for all or one for each. UserError for others."""
    counts = np.array(lengths)
    if counts.dtype.kind not in "iu" and counts.size:
        raise UserError(f"lengths are counts of tokens, not {counts.dtype}")
    if counts.ndim == 0:
        counts = np.full(texts, counts)
    if counts.shape != (texts,):
        raise UserError(f"{counts.size} lengths for {texts} latents")
    wrong = np.flatnonzero((counts < 1) | (counts > longest))
    if len(wrong):
        raise UserError(f"length {counts[wrong[0]]} of text {wrong[0] + 1}: this model takes 1 to {longest} tokens")
    return counts.astype(np.int64)

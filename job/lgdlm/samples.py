"""Samples of LGDLM's two directories: which files belong together, and what is in them.

The files are read in parts of a few hundred pairs, by this process or by several, and come back in the order of their
names whoever read them.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from job.data.console import CountedWork
from job.errors import UserError
from job.lgdlm.arrays import read_npy, read_npz
from job.lgdlm.problems import Problems
from job.lgdlm.workers import in_order

TOKENS_SUFFIX = "_tokens"
AT_ONCE = 512  # pairs that a worker reads together
# What numpy, and the archive that a .npz is, raise for a damaged file; MemoryError where the shape is what is damaged.
DAMAGED = (
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class BadSample(Exception):
    """Why a pair of files cannot be used."""


@dataclass(frozen=True)
class Reading:
    """How samples are read: what every process that reads some of them knows."""

    token_dir: Path
    latent_dir: Path
    vocab_size: int
    validation_fraction: float
    max_length: int | None  # longer samples are left out; None: all are kept
    width: int | None = None  # dimensions of a latent; None: those of the first one


@dataclass
class Part:
    """The usable samples of some pairs, and what was wrong with the others."""

    count: int  # pairs
    tokens: list[np.ndarray] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)  # float32 [D] each
    is_validation: list[bool] = field(default_factory=list)
    too_long: int = 0
    problems: list[tuple[Path, str]] = field(default_factory=list)
    width: int | None = None  # dimensions of a latent, once one is known


Pair = tuple[str, str]  # names of the token file and the latent file


def stems(directory: Path, endings: Sequence[str]) -> list[list[str]]:
    """For each ending the names, sorted and without it, of the files that have it, and none of those before it.

    Strings alone, without objects around them: there may be ten million. UserError without the directory.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    found: list[list[str]] = [[] for _ in endings]
    with os.scandir(directory) as entries, CountedWork(f"files of {directory}") as work:
        for entry in entries:
            work.add(1)
            for ending, of_ending in zip(endings, found, strict=True):
                if entry.name.endswith(ending):
                    of_ending.append(entry.name.removesuffix(ending))
                    break
    for of_ending in found:
        of_ending.sort()
    return found


def find_pairs(reading: Reading, problems: Problems) -> tuple[int, Iterator[Pair]]:
    """How many latents there are, and the token and latent files that belong together, by stem; others are noted.

    UserError for a directory without any: most likely the two were given in the other order.
    """
    suffixed, plain = stems(reading.token_dir, (f"{TOKENS_SUFFIX}.npz", ".npz"))
    if not suffixed and not plain:
        raise UserError(
            f"{reading.token_dir}: no tokens here (NAME{TOKENS_SUFFIX}.npz or NAME.npz); give their directory first, "
            "then that of the latents"
        )
    (latents,) = stems(reading.latent_dir, (".npy",))
    if not latents:
        raise UserError(f"{reading.latent_dir}: no latents here (NAME.npy); give their directory after the tokens'")
    return len(latents), _pairs(reading, problems, suffixed, plain, latents)


def _pairs(
    reading: Reading, problems: Problems, suffixed: list[str], plain: list[str], latents: list[str]
) -> Iterator[Pair]:
    named = heapq.merge(
        ((stem, f"{stem}.npy") for stem in latents),
        ((stem, f"{stem}.npz") for stem in plain),
        ((stem, f"{stem}{TOKENS_SUFFIX}.npz") for stem in suffixed),
    )
    for stem, files in groupby(named, key=lambda file: file[0]):
        names = [name for _, name in files]
        latent = names.pop(0) if names[0] == f"{stem}.npy" else None
        if not names:
            why = f"unpaired, no {stem}{TOKENS_SUFFIX}.npz or {stem}.npz in {reading.token_dir}"
            problems.add(reading.latent_dir / f"{stem}.npy", why)
            continue
        for second in names[1:]:
            problems.add(reading.token_dir / second, f"a second token file beside {names[0]}")
        if latent is None:
            problems.add(reading.token_dir / names[0], f"unpaired, no {stem}.npy in {reading.latent_dir}")
        else:
            yield names[0], latent


def first_sentence(error: Exception) -> str:
    """First sentence of an error: numpy's go on to recommend loading the file unsafely."""
    return str(error).split(". ")[0]


def read_tokens(path: str, vocab_size: int) -> np.ndarray:
    """Real token ids of a file [L], of the smallest type that holds the vocabulary. BadSample for unusable ones."""
    try:
        ids, mask = (array.reshape(-1) for array in read_npz(path, ("input_ids", "attention_mask")))
    except DAMAGED as error:
        raise BadSample(f"corrupt ({first_sentence(error)})") from error
    if ids.shape != mask.shape or ids.dtype.kind not in "iu":
        raise BadSample(f"corrupt (input_ids {ids.dtype} {ids.shape}, attention_mask {mask.shape})")
    ids = ids[mask != 0]
    if not len(ids):
        raise BadSample("no real token")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise BadSample(f"token ids {ids.min()} to {ids.max()} in a vocabulary of {vocab_size}")
    return ids.astype(np.min_scalar_type(vocab_size - 1))


def read_latent(path: str) -> np.ndarray:
    """Latent of a file, float32 [D]. BadSample if it cannot be used."""
    try:
        array = read_npy(path)
    except DAMAGED as error:
        raise BadSample(f"corrupt ({first_sentence(error)})") from error
    if array.ndim not in (1, 2) or not array.size or array.dtype.kind != "f":
        raise BadSample(f"corrupt ({array.dtype} {array.shape})")
    latent = np.atleast_2d(array)[0].astype(np.float32)
    if not np.isfinite(latent).all():
        raise BadSample("not finite")
    return latent


def is_of_validation(tokens: np.ndarray, fraction: float) -> bool:
    """The split of a sample, a function of its tokens alone.

    So equal texts never stand on both sides of it, and a sample keeps its side when others are added.
    """
    digest = hashlib.sha256(tokens.astype("<i8").tobytes()).digest()
    return int.from_bytes(digest[:8], "big") < int(fraction * 2**64)


def read_part(reading: Reading, pairs: Sequence[Pair]) -> Part:
    """Read some pairs."""
    part = Part(len(pairs), width=reading.width)
    for token_name, latent_name in pairs:
        path = f"{reading.token_dir}/{token_name}"  # a Path takes as long as reading the file
        try:
            tokens = read_tokens(path, reading.vocab_size)
            path = f"{reading.latent_dir}/{latent_name}"
            latent = read_latent(path)
            part.width = part.width or len(latent)
            if len(latent) != part.width:
                raise BadSample(f"{len(latent)} dimensions, the first latent has {part.width}")
        except BadSample as error:
            part.problems.append((Path(path), str(error)))
            continue
        if reading.max_length and len(tokens) > reading.max_length:
            part.too_long += 1  # left out, not cut: the latent is one of the whole text
            continue
        part.tokens.append(tokens)
        part.latents.append(latent)
        part.is_validation.append(is_of_validation(tokens, reading.validation_fraction))
    return part


def read_samples(reading: Reading, problems: Problems, workers: int) -> Iterator[Part]:
    """All samples, a part of them at a time. Bad files are noted; all latents have the dimension of the first."""
    latents, pairs = find_pairs(reading, problems)
    parts = iter(lambda: list(islice(pairs, AT_ONCE)), [])
    with CountedWork("samples", latents) as work:
        for part in _parts(reading, parts, workers):
            for path, problem in part.problems:
                problems.add(path, problem)
            work.add(part.count)
            yield part


def _parts(reading: Reading, pairs: Iterator[list[Pair]], workers: int) -> Iterator[Part]:
    """Parts in order. The first ones, until a latent's dimensions are known, are read by this process."""
    for some in pairs:
        part = read_part(reading, some)
        yield part
        if part.width:
            reading = replace(reading, width=part.width)
            break
    yield from in_order(partial(read_part, reading), pairs, workers)

"""The LGDLM research code's data: a directory of token files and one of latents, a sample a file.

TOKEN_DIR/<stem>_tokens.npz or <stem>.npz    input_ids int [S], attention_mask int or bool [S]
LATENT_DIR/<stem>.npy                        float [D], [1, D] or [k, D], of which row 0 counts
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from job.data import tokenizer as tokenizers
from job.data.console import CountedWork, say
from job.data.shards import SPLITS
from job.data.writer import ShardRecord, write_info, write_shard
from job.errors import UsageError, UserError
from job.files import refuse_existing, whole_directory, write_text

TOKENS_SUFFIX = "_tokens"
SHARD_SIZE = 100_000
NAMED_PROBLEMS = 20


@dataclass(frozen=True)
class DataOptions:
    """How the two directories are read. Ids and vocabulary that are None come from the tokenizer."""

    tokenizer: Path | None = None
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    vocab_size: int | None = None
    validation_fraction: float = 0.05
    max_length: int | None = None  # longer samples are left out; None: all are kept
    skip_bad: bool = False


class BadSample(Exception):
    """Why a pair of files cannot be used."""


@dataclass
class Problems:
    """Unpaired and corrupt files: all counted, the first ones named."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, path: Path, problem: str) -> None:
        """Note a file."""
        self.count += 1
        if len(self.named) < NAMED_PROBLEMS:
            self.named.append(f"{path}: {problem}")

    def report(self) -> None:
        """Name the files on standard error."""
        for line in self.named:
            say(line)
        if self.count > len(self.named):
            say(f"... and {self.count - len(self.named)} more")


def find_pairs(token_dir: Path, latent_dir: Path, problems: Problems) -> list[tuple[Path, Path]]:
    """Token and latent files that belong together, by stem; the others are noted."""
    for directory in (token_dir, latent_dir):
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory")
    tokens: dict[str, Path] = {}
    for path in sorted(token_dir.glob("*.npz")):
        stem = path.stem.removesuffix(TOKENS_SUFFIX)
        if stem in tokens:
            problems.add(path, f"a second token file beside {tokens[stem].name}")
        else:
            tokens[stem] = path
    latents = {path.stem: path for path in latent_dir.glob("*.npy")}
    for stem in sorted(tokens.keys() ^ latents.keys()):
        if stem in tokens:
            problems.add(tokens[stem], f"unpaired, no {stem}.npy in {latent_dir}")
        else:
            problems.add(latents[stem], f"unpaired, no {stem}{TOKENS_SUFFIX}.npz or {stem}.npz in {token_dir}")
    return [(tokens[stem], latents[stem]) for stem in sorted(tokens.keys() & latents.keys())]


def first_sentence(error: Exception) -> str:
    """First sentence of an error: numpy's go on to recommend loading the file unsafely."""
    return str(error).split(". ")[0]


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """Real token ids of a file, int64 [L]. BadSample if they cannot be used."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, mask = arrays["input_ids"].reshape(-1), arrays["attention_mask"].reshape(-1)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadSample(f"corrupt ({first_sentence(error)})") from error
    if ids.shape != mask.shape or ids.dtype.kind not in "iu":
        raise BadSample(f"corrupt (input_ids {ids.dtype} {ids.shape}, attention_mask {mask.shape})")
    ids = ids[mask != 0].astype(np.int64)
    if not len(ids):
        raise BadSample("no real token")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise BadSample(f"token ids {ids.min()} to {ids.max()} in a vocabulary of {vocab_size}")
    return ids


def read_latent(path: Path) -> np.ndarray:
    """Latent of a file, float32 [D]. BadSample if it cannot be used."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadSample(f"corrupt ({first_sentence(error)})") from error
    if array.ndim not in (1, 2) or not array.size or array.dtype.kind != "f":
        raise BadSample(f"corrupt ({array.dtype} {array.shape})")
    latent = np.atleast_2d(array)[0].astype(np.float32)
    if not np.isfinite(latent).all():
        raise BadSample("not finite")
    return latent


def read_samples(
    pairs: list[tuple[Path, Path]], vocab_size: int, problems: Problems
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and latent of every usable pair; all latents have the dimension of the first."""
    latent_dim = None
    with CountedWork("samples", len(pairs)) as work:
        for token_path, latent_path in pairs:
            work.add(1)
            path = token_path
            try:
                tokens = read_tokens(token_path, vocab_size)
                path = latent_path
                latent = read_latent(latent_path)
                latent_dim = latent_dim or len(latent)
                if len(latent) != latent_dim:
                    raise BadSample(f"{len(latent)} dimensions, the first latent has {latent_dim}")
            except BadSample as error:
                problems.add(path, str(error))
            else:
                yield tokens, latent


class ShardWriter:
    """Collects samples and writes a shard of a split whenever it is full.

    A sample's split is a function of its tokens alone, so that equal texts never stand on both sides of it, and a
    sample keeps its side when others are added.
    """

    def __init__(self, directory: Path, vocab_size: int, validation_fraction: float) -> None:
        self.directory = directory
        self.vocab_size = vocab_size
        self.boundary = int(validation_fraction * 2**64)
        self.waiting: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {split: [] for split in SPLITS}
        self.records: list[ShardRecord] = []

    def add(self, tokens: np.ndarray, latent: np.ndarray) -> None:
        """Put a sample into its split."""
        digest = hashlib.sha256(tokens.astype("<i8").tobytes()).digest()
        split = "validation" if int.from_bytes(digest[:8], "big") < self.boundary else "train"
        self.waiting[split].append((tokens, latent))
        if len(self.waiting[split]) == SHARD_SIZE:
            self.flush(split)

    def flush(self, split: str) -> None:
        """Write what waits."""
        rows = self.waiting[split]
        if not rows:
            return
        number = sum(record.split == split for record in self.records)
        tokens = [tokens for tokens, _ in rows]
        latents = np.stack([latent for _, latent in rows])
        self.records.append(write_shard(self.directory, split, number, tokens, latents, self.vocab_size))
        self.waiting[split] = []


def special_tokens(tokenizer: tokenizers.TextTokenizer | None, options: DataOptions) -> tuple[int, int, int]:
    """Mask id, padding id and size of the vocabulary: as given, else the tokenizer's."""
    mask, pad, size = options.mask_token_id, options.pad_token_id, options.vocab_size
    if tokenizer:
        mask = tokenizer.mask_token_id if mask is None else mask
        pad = tokenizer.pad_token_id if pad is None else pad
        size = tokenizer.vocab_size if size is None else size
    if mask is None or pad is None or size is None:
        raise UsageError("without --tokenizer, give --mask-token-id, --pad-token-id and --vocab-size")
    if not (0 <= mask < size and 0 <= pad < size):
        raise UsageError(f"--mask-token-id {mask} and --pad-token-id {pad} must lie in the vocabulary of {size}")
    if mask == pad:
        raise UsageError(f"--mask-token-id and --pad-token-id are both {mask}; they must be two different tokens")
    return mask, pad, size


def convert(token_dir: Path, latent_dir: Path, out: Path, options: DataOptions) -> str:
    """Write a dataset from LGDLM's two directories; `out` appears whole or not at all. Returns a summary.

    Unpaired and corrupt files are named on standard error and raise UserError, unless options.skip_bad.
    """
    refuse_existing(out)  # before thousands of files are read
    tokenizer = tokenizers.load(str(options.tokenizer)) if options.tokenizer else None
    mask_token_id, pad_token_id, vocab_size = special_tokens(tokenizer, options)
    problems = Problems()
    pairs = find_pairs(token_dir, latent_dir, problems)
    kept, too_long = 0, 0
    with whole_directory(out) as partial:
        writer = ShardWriter(partial, vocab_size, options.validation_fraction)
        # After the first bad file nothing is kept, but the rest is still read: one run names all bad files.
        for tokens, latent in read_samples(pairs, vocab_size, problems):
            # Left out, not cut: the latent is one of the whole text.
            if options.max_length and len(tokens) > options.max_length:
                too_long += 1
            elif options.skip_bad or not problems.count:
                writer.add(tokens, latent)
                kept += 1
        problems.report()
        if problems.count and not options.skip_bad:
            raise UserError(
                f"{token_dir}: {problems.count} unpaired or corrupt files; "
                "mend or remove them, or leave them out with --skip-bad"
            )
        if too_long and not kept:
            raise UserError(f"{token_dir}: every sample is longer than --max-length {options.max_length}; raise it")
        for split in SPLITS:
            writer.flush(split)
        if tokenizer:
            write_text(partial / tokenizers.TOKENIZER_FILE, tokenizer.to_json())
        made_with = {"validation_fraction": options.validation_fraction, "skipped": problems.count}
        if options.max_length:
            made_with |= {"max_length": options.max_length, "dropped": too_long}
        info = write_info(
            partial,
            writer.records,
            vocab_size=vocab_size,
            mask_token_id=mask_token_id,
            pad_token_id=pad_token_id,
            tokenizer=tokenizers.TOKENIZER_FILE if tokenizer else None,
            encoder={"name": "lgdlm"},
            options=made_with,
            generated_by="python -m job.convert data",
        )
    longer = f"{too_long} longer than --max-length {options.max_length}, " if options.max_length else ""
    return (
        f"{out}: {info.counts['train']} training and {info.counts['validation']} validation samples, "
        f"{problems.count} bad files left out, {longer}at most {info.max_length} tokens, "
        f"{info.latent_dim} latent dimensions"
    )

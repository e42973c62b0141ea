"""The LGDLM research code's data: a directory of token files and one of latents, a sample a file.

TOKEN_DIR/<stem>_tokens.npz or <stem>.npz    input_ids int [S], attention_mask int or bool [S]
LATENT_DIR/<stem>.npy                        float [D], [1, D] or [k, D], of which row 0 counts
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from job.data import tokenizer as tokenizers
from job.data.console import say
from job.data.shards import SPLITS, DatasetInfo
from job.data.writer import ShardRecord, write_info, write_shard
from job.errors import UsageError, UserError
from job.files import refuse_existing, whole_directory, write_text
from job.lgdlm.problems import Problems
from job.lgdlm.samples import Part, Reading, read_samples

SHARD_SIZE = 100_000


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
    workers: int = 1  # processes that read; the result is the same for any number


class ShardWriter:
    """Collects samples and writes a shard of a split whenever it is full.

    A thread writes it, while more samples come: a disk takes seconds to have one safe, in which nobody would read.
    """

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self.directory = directory
        self.vocab_size = vocab_size
        self.count = 0  # samples
        self._waiting: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {split: [] for split in SPLITS}
        self._shards: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self._thread = ThreadPoolExecutor(1)
        self._written: list[Future[ShardRecord]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()  # the directory may be removed next

    def add(self, part: Part) -> None:
        """Put samples into their splits."""
        for tokens, latent, is_validation in zip(part.tokens, part.latents, part.is_validation, strict=True):
            split = "validation" if is_validation else "train"
            self._waiting[split].append((tokens, latent))
            if len(self._waiting[split]) == SHARD_SIZE:
                self._flush(split)
        self.count += len(part.tokens)

    def records(self) -> list[ShardRecord]:
        """Write what waits; returns the records of all shards, in order within each split."""
        for split in SPLITS:
            if self._waiting[split]:
                self._flush(split)
        return [shard.result() for shard in self._written]

    def _flush(self, split: str) -> None:
        rows, self._waiting[split] = self._waiting[split], []
        number, self._shards[split] = self._shards[split], self._shards[split] + 1
        if self._written:
            self._written[-1].result()  # one at a time: memory holds no more than two
        self._written.append(self._thread.submit(self._write, split, number, rows))

    def _write(self, split: str, number: int, rows: list[tuple[np.ndarray, np.ndarray]]) -> ShardRecord:
        tokens = [tokens for tokens, _ in rows]
        latents = np.stack([latent for _, latent in rows])
        return write_shard(self.directory, split, number, tokens, latents, self.vocab_size)


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

    Unpaired and corrupt files are listed in a file beside `out` and raise UserError, unless options.skip_bad.
    """
    refuse_existing(out)  # before thousands of files are read
    tokenizer = tokenizers.load(str(options.tokenizer)) if options.tokenizer else None
    mask_token_id, pad_token_id, vocab_size = special_tokens(tokenizer, options)
    reading = Reading(token_dir, latent_dir, vocab_size, options.validation_fraction, options.max_length)
    with (
        Problems(out) as problems,
        whole_directory(out) as partial,
        ShardWriter(partial, vocab_size) as writer,
    ):
        too_long = write_samples(writer, reading, problems, options)
        if tokenizer:
            write_text(partial / tokenizers.TOKENIZER_FILE, tokenizer.to_json())
        made_with = {"validation_fraction": options.validation_fraction, "skipped": problems.count}
        if options.max_length:
            made_with |= {"max_length": options.max_length, "dropped": too_long}
        info = write_info(
            partial,
            writer.records(),
            vocab_size=vocab_size,
            mask_token_id=mask_token_id,
            pad_token_id=pad_token_id,
            tokenizer=tokenizers.TOKENIZER_FILE if tokenizer else None,
            encoder={"name": "lgdlm"},
            options=made_with,
            generated_by="python -m job.convert data",
        )
    return summary(out, info, problems)


def write_samples(writer: ShardWriter, reading: Reading, problems: Problems, options: DataOptions) -> int:
    """Write all samples that can be used; returns how many were too long. UserError where a file is bad."""
    too_long = 0
    is_told = False
    for part in read_samples(reading, problems, options.workers):
        too_long += part.too_long
        if options.skip_bad or not problems.count:
            writer.add(part)
        elif not is_told:
            is_told = True
            say("nothing will be written (--skip-bad leaves such files out); the rest is read to list all bad files")
    problems.publish()
    if problems.count and not options.skip_bad:
        raise UserError(
            f"{reading.token_dir}: {problems.count} unpaired or corrupt files, listed in {problems.path}; "
            "mend or remove them, or leave them out with --skip-bad"
        )
    if too_long and not writer.count:
        raise UserError(f"{reading.token_dir}: every sample is longer than --max-length {options.max_length}; raise it")
    return too_long


def summary(out: Path, info: DatasetInfo, problems: Problems) -> str:
    """A line on what was written and what was not."""
    made = info.options
    bad = f"{problems.count} bad files left out" + (f" (listed in {problems.path})" if problems.count else "")
    longer = f"{made['dropped']} longer than --max-length {made['max_length']}, " if made.get("max_length") else ""
    return (
        f"{out}: {info.counts['train']} training and {info.counts['validation']} validation samples, "
        f"{bad}, {longer}at most {info.max_length} tokens, {info.latent_dim} latent dimensions"
    )

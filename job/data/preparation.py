"""The stages of `python -m job.prepare`. Each leaves its result in DIR/work, whole or not at all, so that a killed run goes on and several
processes share the work through the directory alone; dataset.json comes last and makes it a dataset.

    rank 0     texts -> split and shards of text, tokenizer, fitted encoder -> plan.json
    all ranks  every world_size-th shard: tokens and latents -> record
    rank 0     all records -> dataset.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from job.data import tokenizer as tokenizers
from job.data.encoders import Encoder, LsaEncoder, SentenceTransformersEncoder
from job.data.shards import INFO_FILE, SPLITS, DatasetInfo, read_info
from job.data.sources import STDLIB, read_texts
from job.data.writer import ShardRecord, write_info, write_shard
from job.errors import UserError
from job.files import TEMPORARY, write_json, write_whole

CHUNK = 4096  # texts encoded between two reports of progress
POLL_SECONDS = 0.1
REPORT_SECONDS = 10.0


@dataclass
class Options:
    """What a dataset is made of: two directories prepared with the same options from the same texts are equal bit for bit."""

    source: list[str]
    text_key: str
    hf_split: str
    split_sentences: bool
    max_samples: int | None
    validation_fraction: float
    max_length: int
    shard_size: int
    seed: int
    tokenizer: str
    vocab_size: int | None
    mask_token: str | None
    pad_token: str | None
    encoder: str
    latent_dim: int | None
    encoder_model: str | None
    truncate_dim: int | None
    encoder_batch_size: int | None
    encoder_dtype: str | None
    python: str | None = None  # whose standard library was read

    def __post_init__(self) -> None:
        self.python = platform.python_version() if STDLIB in self.source else None


@dataclass
class Run:
    """One process of the command."""

    out: Path
    options: Options
    rank: int
    world_size: int
    local_files_only: bool
    encoder_device: str | None
    local_rank: int = 0  # on this machine

    @property
    def work(self) -> Path:
        """Directory of unfinished work."""
        return self.out / "work"

    @property
    def plan_file(self) -> Path:
        """What rank 0 tells the others, and a later run: options, shards, counts."""
        return self.work / "plan.json"

    @property
    def encoder_file(self) -> Path:
        """The fitted encoder."""
        return self.work / "encoder.pickle"

    def texts_file(self, split: str, number: int) -> Path:
        """Texts of one shard, a JSON list."""
        return self.work / f"{split}-{number:05d}.texts.json"

    def record_file(self, split: str, number: int) -> Path:
        """ShardRecord of a finished shard."""
        return self.work / f"{split}-{number:05d}.record.json"


def say(message: str) -> None:
    """A line about the course of the work, apart from the result on standard output."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A bar on a terminal; otherwise a line every few seconds."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total, self.done, self.last = what, total, 0, time.monotonic()
        self.bar = tqdm(desc=what, total=total, unit="", disable=not sys.stderr.isatty(), leave=False)

    def add(self, count: int) -> None:
        """Report `count` more."""
        self.done += count
        self.bar.update(count)
        if self.bar.disable and time.monotonic() - self.last > REPORT_SECONDS:
            self.last = time.monotonic()
            say(f"{self.what}: {self.done}" + (f" of {self.total}" if self.total else ""))


def text_hash(text: str) -> bytes:
    """Hash of a text's words: texts that differ in case or white space alone are the same text, and never meet across the split."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()[:16]


def split_texts(
    texts: Iterable[str], max_samples: int | None, validation_fraction: float
) -> tuple[dict[str, list[str]], int]:
    """Texts of each split, in the order of their hashes (so that any prefix is a random sample), and the number of duplicates dropped.

    A text's split depends on nothing but its words.
    """
    chosen: dict[bytes, str] = {}
    duplicates = 0
    progress = Progress("texts", max_samples)
    for text in texts:
        digest = text_hash(text)
        if digest in chosen:
            duplicates += 1
            continue
        chosen[digest] = text
        progress.add(1)
        if len(chosen) == max_samples:
            break
    progress.bar.close()
    boundary = int(validation_fraction * 2**64)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for digest in sorted(chosen, key=lambda digest: digest[8:]):
        splits["validation" if int.from_bytes(digest[:8], "big") < boundary else "train"].append(chosen[digest])
    return splits, duplicates


def _plan(run: Run) -> None:
    """Rank 0's first stage."""
    options = run.options
    shutil.rmtree(run.work, ignore_errors=True)
    # What can be missing is looked for before the texts are read.
    tokenizer = (
        None
        if options.tokenizer == "train"
        else tokenizers.load(
            options.tokenizer,
            local_files_only=run.local_files_only,
            mask_token=options.mask_token,
            pad_token=options.pad_token,
        )
    )
    if options.encoder != "lsa":
        _encoder(run)
    texts = read_texts(
        options.source, text_key=options.text_key, hf_split=options.hf_split, split_sentences=options.split_sentences
    )
    splits, duplicates = split_texts(texts, options.max_samples, options.validation_fraction)
    for split, of_split in splits.items():
        if not of_split:
            raise UserError(
                f"--source {' '.join(options.source)}: no text for the {split} split; give more texts or another --validation-fraction"
            )
    say(f"{sum(map(len, splits.values()))} texts, {duplicates} duplicates dropped")
    tokenizer = tokenizer or tokenizers.train(splits["train"], options.vocab_size or 0)
    write_whole(run.out / tokenizers.TOKENIZER_FILE, lambda file: file.write(tokenizer.to_json().encode()))
    say(f"tokenizer of {tokenizer.vocab_size} tokens")
    if options.encoder == "lsa":
        write_whole(run.encoder_file, LsaEncoder.fit(splits["train"], options.latent_dim or 0, options.seed).save)
        say("encoder fitted")
    for split, of_split in splits.items():
        for number, start in enumerate(range(0, len(of_split), options.shard_size)):
            write_json(run.texts_file(split, number), of_split[start : start + options.shard_size])
    write_json(
        run.plan_file,
        {
            "options": dataclasses.asdict(options),
            "duplicates": duplicates,
            "mask_token_id": tokenizer.mask_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "shards": {split: -(-len(splits[split]) // options.shard_size) for split in SPLITS},
        },
    )


def refuse_other_options(out: Path, there: dict[str, Any], options: Options) -> None:
    """UserError naming the first option in which a directory differs from this command."""
    for name, value in dataclasses.asdict(options).items():
        if there.get(name) != value:
            raise UserError(
                f"{out}: was prepared with --{name.replace('_', '-')} {there.get(name)}, not {value}; give the same options, "
                "another --out, or delete the directory"
            )


def _encoder(run: Run) -> Encoder:
    options = run.options
    if options.encoder == "lsa":
        return LsaEncoder.load(run.encoder_file)
    return SentenceTransformersEncoder(
        options.encoder_model or "",
        truncate_dim=options.truncate_dim,
        batch_size=options.encoder_batch_size or 1,
        dtype=options.encoder_dtype or "float32",
        device=run.encoder_device,
        local_rank=run.local_rank,
        local_files_only=run.local_files_only,
    )


def _encode(
    texts: Sequence[str], tokenizer: tokenizers.TextTokenizer, encoder: Encoder, max_length: int, progress: Progress
) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens and latents of the texts that fit into `max_length` tokens. The others are dropped: a cut text would have the latent of
    words that are not there, and two texts that differ behind the cut could become one row in both splits."""
    rows: list[np.ndarray] = []
    latents: list[np.ndarray] = []
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        tokens = tokenizer.encode(chunk)
        fits = [0 < len(row) <= max_length for row in tokens]
        rows += [row for row, fit in zip(tokens, fits, strict=True) if fit]
        if any(fits):
            latents.append(encoder.encode([text for text, fit in zip(chunk, fits, strict=True) if fit]))
        progress.add(len(chunk))
    return rows, np.concatenate(latents) if latents else np.zeros((0, encoder.encode(texts[:1]).shape[1]), np.float32)


def _write_shards(run: Run, plan: dict[str, Any]) -> None:
    """This rank's share of the shards, finished ones left out."""
    everything = [(split, number) for split in SPLITS for number in range(plan["shards"][split])]
    mine = [
        (split, number)
        for split, number in everything[run.rank :: run.world_size]
        if not run.record_file(split, number).exists()
    ]
    if not mine:
        return
    encoder = _encoder(run)
    write_json(run.work / "encoder.json", encoder.description)
    tokenizer = tokenizers.saved(run.out / tokenizers.TOKENIZER_FILE, plan["mask_token_id"], plan["pad_token_id"])
    for split, number in mine:
        texts = json.loads(run.texts_file(split, number).read_bytes())
        progress = Progress(f"{split} shard {number}", len(texts))
        rows, latents = _encode(texts, tokenizer, encoder, run.options.max_length, progress)
        progress.bar.close()
        if not np.isfinite(latents).all():
            raise UserError(
                f"the encoder gave a latent that is not finite, in {split} shard {number}; try --encoder-dtype float32"
            )
        record = write_shard(run.out, split, number, rows, latents, tokenizer.vocab_size)
        record.dropped = len(texts) - len(rows)
        write_json(run.record_file(split, number), dataclasses.asdict(record))
        say(f"{split} shard {number}: {record.rows} rows")


def _finish(run: Run, plan: dict[str, Any]) -> DatasetInfo:
    """Rank 0's last stage."""
    files = [run.record_file(split, number) for split in SPLITS for number in range(plan["shards"][split])]
    _wait(lambda: all(file.exists() for file in files))
    records = [ShardRecord(**json.loads(file.read_bytes())) for file in files]
    if not any(record.rows for record in records if record.split == "train"):
        raise UserError(
            f"every text is longer than --max-length {run.options.max_length} tokens; raise it, or cut texts with --split-sentences"
        )
    options = dataclasses.asdict(run.options) | {
        "duplicates": plan["duplicates"],
        "dropped": sum(record.dropped for record in records),
    }
    tokenizer = tokenizers.saved(run.out / tokenizers.TOKENIZER_FILE, plan["mask_token_id"], plan["pad_token_id"])
    info = write_info(
        run.out,
        records,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=plan["mask_token_id"],
        pad_token_id=plan["pad_token_id"],
        tokenizer=tokenizers.TOKENIZER_FILE,
        encoder=json.loads((run.work / "encoder.json").read_bytes()),
        options=options,
        generated_by="python -m job.prepare",
    )
    shutil.rmtree(run.work, ignore_errors=True)
    for leftover in run.out.glob(f".*{TEMPORARY}"):  # of a process killed while it wrote
        leftover.unlink()
    return info


def _wait(ready: Callable[[], bool]) -> None:
    while not ready():
        time.sleep(POLL_SECONDS)


def finished(run: Run) -> DatasetInfo | None:
    """The dataset in the run's directory, if it is there. UserError if it was prepared with other options."""
    if not (run.out / INFO_FILE).is_file():
        return None
    info = read_info(run.out)
    refuse_other_options(run.out, info.options, run.options)
    return info


def prepare(run: Run) -> DatasetInfo | None:
    """Do this process's part. Returns the finished dataset's description on rank 0, None on the others."""
    if run.rank == 0 and run.plan_file.is_file():
        refuse_other_options(run.out, json.loads(run.plan_file.read_bytes())["options"], run.options)
        say(f"going on with the work in {run.out}")
    elif run.rank == 0:
        _plan(run)
    else:
        _wait(lambda: run.plan_file.is_file() or (run.out / INFO_FILE).is_file())
    if (run.out / INFO_FILE).is_file():  # no share was left for this rank
        return None
    plan = json.loads(run.plan_file.read_bytes())
    refuse_other_options(run.out, plan["options"], run.options)
    _write_shards(run, plan)
    return _finish(run, plan) if run.rank == 0 else None

"""The stages of `python -m job.prepare`, which a kill may interrupt anywhere and several processes may share.

    rank 0     texts -> split and shards of text, tokenizer, fitted encoder -> plan.json
    all ranks  every world_size-th shard: tokens and latents -> record
    rank 0     all records -> dataset.json

Each stage leaves its result in DIR/work, and every file appears whole or not at all, so a file that exists is a stage
that is done. That is all that the processes know of each other: there is no process group and no lock. Rank 0 writes
plan.json last of its first stage and the others wait for it; a shard belongs to one rank by its number; its record is
written after its files. A killed process leaves files without a record, which are written again, to the same bits.
dataset.json comes last and makes the directory a dataset; then DIR/work goes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from job.data import tokenizer as tokenizers
from job.data.console import CountedWork, say
from job.data.encoders import Encoder, LsaEncoder, SentenceTransformersEncoder
from job.data.options import LocalOptions, Options, flag
from job.data.shards import INFO_FILE, SPLITS, DatasetInfo, read_info
from job.data.sources import read_texts
from job.data.splitting import split_texts
from job.data.writer import ShardRecord, write_info, write_shard
from job.errors import UserError
from job.files import TEMPORARY, write_json, write_text, write_whole

CHUNK = 4096  # texts encoded between two reports of progress
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class TextShard:
    """One shard's worth of texts, and the files of its preparation."""

    work: Path
    split: str
    number: int

    @property
    def texts_file(self) -> Path:
        """Its texts, a JSON list."""
        return self.work / f"{self.split}-{self.number:05d}.texts.json"

    @property
    def record_file(self) -> Path:
        """Its ShardRecord, written when the shard is finished."""
        return self.work / f"{self.split}-{self.number:05d}.record.json"


@dataclass
class Preparation:
    """One process's part in the preparation of a dataset."""

    out: Path
    options: Options
    local: LocalOptions
    rank: int
    local_rank: int  # on this machine
    world_size: int

    @property
    def work(self) -> Path:
        """Directory of unfinished work."""
        return self.out / "work"

    @property
    def plan_file(self) -> Path:
        """What rank 0 tells the others, and a later call: options, shards, counts."""
        return self.work / "plan.json"

    @property
    def encoder_file(self) -> Path:
        """The fitted encoder."""
        return self.work / "encoder.pickle"

    @property
    def encoder_description_file(self) -> Path:
        """What dataset.json says of the encoder."""
        return self.work / "encoder.json"

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, already at its place in the dataset."""
        return self.out / tokenizers.TOKENIZER_FILE

    def shards(self, plan: dict[str, Any]) -> list[TextShard]:
        """All shards of a plan."""
        return [TextShard(self.work, split, number) for split in SPLITS for number in range(plan["shards"][split])]

    def tokenizer(self, plan: dict[str, Any]) -> tokenizers.TextTokenizer:
        """The tokenizer that the first stage wrote."""
        return tokenizers.saved(self.tokenizer_file, plan["mask_token_id"], plan["pad_token_id"])

    def encoder(self) -> Encoder:
        """The encoder: fitted by the first stage, or a model of a library."""
        if self.options.encoder == "lsa":
            return LsaEncoder.load(self.encoder_file)
        return SentenceTransformersEncoder(self.options, self.local, self.local_rank)


def finished(preparation: Preparation) -> DatasetInfo | None:
    """The dataset in the directory, if it is there. UserError if it was prepared with other options."""
    if not (preparation.out / INFO_FILE).is_file():
        return None
    info = read_info(preparation.out)
    refuse_other_options(preparation, info.options)
    return info


def prepare(preparation: Preparation) -> DatasetInfo | None:
    """Do this process's part. Returns the finished dataset's description on rank 0, None on the others."""
    if preparation.rank == 0 and preparation.plan_file.is_file():
        refuse_other_options(preparation, _read_json(preparation.plan_file)["options"])
        say(f"going on with the work in {preparation.out}")
    elif preparation.rank == 0:
        _plan(preparation)
    else:
        info_file = preparation.out / INFO_FILE
        _wait(lambda: preparation.plan_file.is_file() or info_file.is_file())
        if info_file.is_file():  # rank 0 finished the work of an earlier call before this process came to look
            return None
    plan = _read_json(preparation.plan_file)
    refuse_other_options(preparation, plan["options"])
    _write_shards(preparation, plan)
    return _finish(preparation, plan) if preparation.rank == 0 else None


def refuse_other_options(preparation: Preparation, there: dict[str, Any]) -> None:
    """UserError naming the first option in which a directory differs from this command."""
    for name, value in dataclasses.asdict(preparation.options).items():
        if there.get(name) != value:
            raise UserError(
                f"{preparation.out}: was prepared with {flag(name)} {there.get(name)}, not {value}; "
                "give the same options, another --out, or delete the directory"
            )


def _plan(preparation: Preparation) -> None:
    """Rank 0's first stage: everything that needs all the texts."""
    options = preparation.options
    # Without a plan, what lies here is a first stage that was killed. It starts anew: nothing says with what options.
    shutil.rmtree(preparation.work, ignore_errors=True)
    # What can be missing is looked for before the texts are read, which may take an hour.
    given = None if options.tokenizer == "train" else _given_tokenizer(preparation)
    if options.encoder != "lsa":
        preparation.encoder()
    splits, duplicates = _read_splits(options)
    tokenizer = given or tokenizers.train(splits["train"], options.vocab_size or 0)
    write_text(preparation.tokenizer_file, tokenizer.to_json())
    say(f"tokenizer of {tokenizer.vocab_size} tokens")
    if options.encoder == "lsa":
        encoder = LsaEncoder.fit(splits["train"], options.latent_dim or 0, options.seed)
        write_whole(preparation.encoder_file, encoder.save)
        say("encoder fitted")
    counts: dict[str, int] = {}
    for split, texts in splits.items():
        shards = [texts[start : start + options.shard_size] for start in range(0, len(texts), options.shard_size)]
        for number, of_shard in enumerate(shards):
            write_json(TextShard(preparation.work, split, number).texts_file, of_shard)
        counts[split] = len(shards)
    plan = {
        "options": dataclasses.asdict(options),
        "duplicates": duplicates,
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "shards": counts,
    }
    write_json(preparation.plan_file, plan)


def _given_tokenizer(preparation: Preparation) -> tokenizers.TextTokenizer:
    options = preparation.options
    return tokenizers.load(
        options.tokenizer,
        local_files_only=preparation.local.local_files_only,
        mask_token=options.mask_token,
        pad_token=options.pad_token,
    )


def _read_splits(options: Options) -> tuple[dict[str, list[str]], int]:
    """Texts of each split and the number of duplicates. UserError when a split is empty."""
    texts = read_texts(
        options.source,
        text_key=options.text_key,
        hf_split=options.hf_split,
        split_sentences=options.split_sentences,
    )
    splits, duplicates = split_texts(texts, options.max_samples, options.validation_fraction)
    for split, of_split in splits.items():
        if not of_split:
            raise UserError(
                f"--source {' '.join(options.source)}: no text for the {split} split; "
                "give more texts or another --validation-fraction"
            )
    say(f"{sum(map(len, splits.values()))} texts, {duplicates} duplicates dropped")
    return splits, duplicates


def _write_shards(preparation: Preparation, plan: dict[str, Any]) -> None:
    """Write this rank's share of the shards, finished ones left out.

    Every world_size-th shard, so that the share is known without asking anyone. A later call with another number of
    processes divides what is left anew.
    """
    share = preparation.shards(plan)[preparation.rank :: preparation.world_size]
    left = [shard for shard in share if not shard.record_file.exists()]
    if not left:
        return  # without loading the encoder
    encoder = preparation.encoder()
    write_json(preparation.encoder_description_file, encoder.description)  # every rank writes the same
    tokenizer = preparation.tokenizer(plan)
    for shard in left:
        texts = _read_json(shard.texts_file)
        name = f"{shard.split} shard {shard.number}"
        with CountedWork(name, len(texts)) as work:
            rows, latents = _encode(texts, tokenizer, encoder, preparation.options.max_length, work)
        # Half precision overflows in some models. Written down, such a latent would show only in training, as a loss
        # that is not finite at whatever step draws it.
        if not np.isfinite(latents).all():
            raise UserError(f"the encoder gave a latent that is not finite, in {name}; try --encoder-dtype float32")
        record = write_shard(preparation.out, shard.split, shard.number, rows, latents, tokenizer.vocab_size)
        record.dropped = len(texts) - len(rows)
        write_json(shard.record_file, dataclasses.asdict(record))
        say(f"{name}: {record.rows} rows")


def _encode(
    texts: Sequence[str],
    tokenizer: tokenizers.TextTokenizer,
    encoder: Encoder,
    max_length: int,
    work: CountedWork,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Token rows, int64 [L] each, and latents, float32 [rows, D], of the texts that fit into `max_length` tokens.

    Longer texts are dropped. Cut instead, a text would have the latent of words that are not there, and two texts
    that differ behind the cut could become one row in both splits.
    """
    rows: list[np.ndarray] = []
    latents: list[np.ndarray] = []
    for chunk in _chunks(texts):
        tokens = tokenizer.encode(chunk)
        fitting = [index for index, row in enumerate(tokens) if 0 < len(row) <= max_length]
        if fitting:
            rows += [tokens[index] for index in fitting]
            latents.append(encoder.encode([chunk[index] for index in fitting]))
        work.add(len(chunk))
    if not latents:  # a shard of long texts alone still has latents of the right dimension
        latents.append(encoder.encode(texts[:1])[:0].astype(np.float32))
    return rows, np.concatenate(latents)


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), CHUNK):
        yield texts[start : start + CHUNK]


def _finish(preparation: Preparation, plan: dict[str, Any]) -> DatasetInfo:
    """Rank 0's last stage: wait for the other ranks' records, and make the directory a dataset."""
    files = [shard.record_file for shard in preparation.shards(plan)]
    _wait(lambda: all(file.exists() for file in files))
    records = [ShardRecord(**_read_json(file)) for file in files]
    if not any(record.rows for record in records if record.split == "train"):
        raise UserError(
            f"every text is longer than --max-length {preparation.options.max_length} tokens; "
            "raise it, or cut texts with --split-sentences"
        )
    options = dataclasses.asdict(preparation.options)
    options["duplicates"] = plan["duplicates"]
    options["dropped"] = sum(record.dropped for record in records)
    info = write_info(
        preparation.out,
        records,
        vocab_size=preparation.tokenizer(plan).vocab_size,
        mask_token_id=plan["mask_token_id"],
        pad_token_id=plan["pad_token_id"],
        tokenizer=preparation.tokenizer_file.name,
        encoder=_read_json(preparation.encoder_description_file),
        options=options,
        generated_by="python -m job.prepare",
    )
    shutil.rmtree(preparation.work, ignore_errors=True)
    for leftover in preparation.out.glob(f".*{TEMPORARY}"):  # of a process killed while it wrote
        leftover.unlink()
    return info


def _read_json(file: Path) -> Any:
    return json.loads(file.read_bytes())


def _wait(ready: Callable[[], bool]) -> None:
    """Wait for other processes. Polling a shared directory is all that works on every cluster's file system."""
    while not ready():
        time.sleep(POLL_SECONDS)

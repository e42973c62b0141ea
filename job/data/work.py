"""One process's part in a preparation, and where its files are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data import tokenizer as tokenizers
from job.data.encoders import Resources
from job.data.failed import Failure
from job.data.like import Pattern
from job.data.options import LocalOptions, Options
from job.data.shards import INFO_FILE, SPLITS


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
    def latents_file(self) -> Path:
        """The latents that were given with its texts, float32 [texts, D]."""
        return self.work / f"{self.split}-{self.number:05d}.given.npy"

    def chunk_file(self, number: int | str) -> Path:
        """The latents of a chunk of its texts, while the shard is not finished; `*` for all chunks."""
        return self.work / f"{self.split}-{self.number:05d}.chunk-{number}.npy"

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
    run: str = ""  # the same for all processes that share the work
    pattern: Pattern | None = None  # of --like
    failed_before: Failure | None = None  # of an array: what was there when this process began

    @property
    def work(self) -> Path:
        """Directory of unfinished work."""
        return self.out / "work"

    @property
    def plan_file(self) -> Path:
        """What rank 0 tells the others, and a later call: options, sources, tokenizer, encoder, shards, counts."""
        return self.work / "plan.json"

    @property
    def info_file(self) -> Path:
        """The description that makes the directory a dataset."""
        return self.out / INFO_FILE

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, already at its place in the dataset."""
        return self.out / tokenizers.TOKENIZER_FILE

    @property
    def resources(self) -> Resources:
        """How this process runs an encoder."""
        return Resources(
            device=self.local.encoder_device,
            local_rank=self.local_rank,
            local_files_only=self.local.local_files_only,
            batch_size=self.options.encoder_batch_size or Resources.batch_size,
        )

    def shards(self, plan: dict[str, Any]) -> list[TextShard]:
        """All shards of a plan."""
        return [TextShard(self.work, split, number) for split in SPLITS for number in range(plan["shards"][split])]

    def tokenizer(self, plan: dict[str, Any]) -> tokenizers.TextTokenizer:
        """The tokenizer that the first stage wrote."""
        return tokenizers.saved(self.tokenizer_file, plan["mask_token_id"], plan["pad_token_id"])


def read_json(file: Path) -> Any:
    """The value in a file of JSON."""
    return json.loads(file.read_bytes())

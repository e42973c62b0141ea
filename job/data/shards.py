"""The prepared dataset: memory-mapped shards described by `dataset.json`, which is written last.

DIR/dataset.json                  DatasetInfo
DIR/tokenizer.json                absent when the tokens came without a tokenizer
DIR/encoder.safetensors           the fitted encoder of `--encoder lsa` (job.data.encoders)
DIR/train-00000.tokens.npy        all rows after each other, smallest sufficient unsigned type
DIR/train-00000.offsets.npy       int64 [rows + 1], row i is tokens[offsets[i]:offsets[i + 1]]
DIR/train-00000.latents.npy       float32 [rows, latent_dim]

A training split may end with shards whose rows lack a half (job.row_kinds): those of texts alone have no file of
latents, those of latents alone none of tokens. Of these the offsets are of likely lengths.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from job.errors import UserError
from job.files import file_entry
from job.row_kinds import KIND_NAMES, LATENT, PAIRED, TEXT, Counts

FORMAT_VERSION = 2
OLDER_VERSIONS = (1,)  # without unpaired rows
INFO_FILE = "dataset.json"
PARTS = ("tokens", "offsets", "latents")
PARTS_OF_KIND = {PAIRED: PARTS, TEXT: ("tokens", "offsets"), LATENT: ("offsets", "latents")}

# Every rank needs the lengths of the whole global batch, rows from all over the data: thousands of single pages of a
# shared file system a step. So the lengths of a split of no more rows than this are kept in memory, in 1 or 2 bytes
# each, and come from whole files. Of a larger split the first batch would wait for gigabytes.
INDEXED_ROWS = 2**26

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)
LEAST_ROWS = {"train": 1, "validation": 2}  # an evaluation compares a sample with another one


@dataclass
class DatasetInfo:
    """Content of dataset.json; the synthetic dataset has one too."""

    vocab_size: int
    latent_dim: int
    max_length: int  # tokens of the longest row
    mask_token_id: int
    pad_token_id: int
    counts: dict[str, int]  # rows of each split
    shards: dict[str, list[int]]  # rows of each shard of each split
    latent_mean: list[float]  # of the training split, like the next two
    latent_std: list[float]  # 1 where a dimension is constant, so that dividing by it is safe
    token_counts: list[int]  # how often each token id occurs
    encoder: dict[str, Any]
    tokenizer: str | None  # file name; its hash is in `files`
    files: dict[str, dict[str, Any]]  # name -> {sha256, bytes}
    options: dict[str, Any]  # of the command that made it
    generated_by: str
    unpaired: dict[str, int] = field(default_factory=dict)  # "text", "latent": training rows that are that alone
    format_version: int = FORMAT_VERSION

    def rows_of_kinds(self, split: str) -> Counts:
        """How many rows of a split are paired, texts alone, and latents alone: they come in this order."""
        unpaired = self.unpaired if split == "train" else {}
        texts, latents = (unpaired.get(KIND_NAMES[kind], 0) for kind in (TEXT, LATENT))
        return self.counts[split] - texts - latents, texts, latents


class Dataset(Protocol):
    """One split: what sampler and loader need of it."""

    info: DatasetInfo
    fingerprint: str

    def __len__(self) -> int: ...

    def lengths(self, indices: np.ndarray) -> np.ndarray: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...


def shard_file(split: str, number: int, part: str) -> str:
    """Name of one of the three files of a shard."""
    return f"{split}-{number:05d}.{part}.npy"


def read_info(directory: Path) -> DatasetInfo:
    """Read dataset.json; UserError if it is missing, damaged or of another format."""
    path = Path(directory) / INFO_FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory}: no finished dataset here ({INFO_FILE} is missing); "
            f"prepare one with `python -m job.prepare --out {directory}`, the same command finishes an interrupted one"
        ) from None
    return info_of(content, str(path))


def info_of(content: bytes, where: str) -> DatasetInfo:
    """What dataset.json says; UserError that names it if it is damaged or of another format."""
    try:
        values = json.loads(content)
        if values["format_version"] in (*OLDER_VERSIONS, FORMAT_VERSION):
            return DatasetInfo(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: damaged or not a dataset description ({error!r}); prepare the data again") from error
    raise UserError(
        f"{where}: format_version {values['format_version']}, this version reads {FORMAT_VERSION}; "
        "prepare the data again"
    )


def check_files(directory: Path, info: DatasetInfo, verify_hashes: bool) -> None:
    """Refuse a dataset with a file that is missing, of another size, or of another hash.

    Hashes are checked where asked, and of the tokenizer always.
    """
    for name, entry in info.files.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path}: missing; copy the dataset again or prepare it again")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{path}: corrupt, {path.stat().st_size} bytes instead of {entry['bytes']}; "
                "copy the dataset again or prepare it again"
            )
        if (verify_hashes or name == info.tokenizer) and file_entry(path)["sha256"] != entry["sha256"]:
            what = "the tokenizer was changed after the data was prepared" if name == info.tokenizer else "corrupt"
            raise UserError(
                f"{path}: {what}, its SHA-256 is not the one in {INFO_FILE}; copy the dataset again or prepare it again"
            )


class ShardDataset:
    """One split of a prepared directory, memory-mapped; shards are opened when first touched.

    Raises UserError for a missing, truncated or changed file; bit flips are found with `verify_hashes`.
    """

    def __init__(self, directory: Path, split: Split, verify_hashes: bool = False) -> None:
        self.directory = Path(directory)
        self.split = split
        self.info = read_info(self.directory)
        check_files(self.directory, self.info, verify_hashes)
        self.fingerprint = hashlib.sha256((self.directory / INFO_FILE).read_bytes()).hexdigest()
        self._starts = np.concatenate([[0], np.cumsum(self.info.shards[split], dtype=np.int64)])
        self._kind_ends = np.cumsum(self.info.rows_of_kinds(split))
        self._open: dict[int, dict[str, np.ndarray]] = {}
        self._indexed: dict[int, np.ndarray] = {}  # lengths of the rows of a shard

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _kind(self, index: int) -> int:
        """The kind of a row."""
        return int(np.searchsorted(self._kind_ends, index, side="right"))

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a shard, by name."""
        if number not in self._open:
            parts = PARTS_OF_KIND[self._kind(int(self._starts[number]))]
            self._open[number] = {part: self._read(number, part, mapped=True) for part in parts}
        return self._open[number]

    def _read(self, number: int, part: str, mapped: bool) -> np.ndarray:
        """One of the arrays of a shard: mapped into memory, or read."""
        path = self.directory / shard_file(self.split, number, part)
        try:
            array: np.ndarray = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
            if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
                # Rows come from all over the file. Left to itself, the system reads megabytes around each of them.
                array.base.madvise(mmap.MADV_RANDOM)
            return array.view(np.ndarray)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); copy the dataset again or prepare it again") from error

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Token counts of these samples, int64, read from the offsets alone."""
        lengths = np.empty(len(indices), np.int64)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(shards):
            chosen = shards == number
            rows = np.asarray(indices)[chosen] - self._starts[number]
            lengths[chosen] = self._lengths_of(int(number), rows)
        return lengths

    def _lengths_of(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Token counts of rows of a shard."""
        if len(self) > INDEXED_ROWS:
            offsets = self._shard(number)["offsets"]
            return np.asarray(offsets[rows + 1] - offsets[rows])
        if number not in self._indexed:
            lengths = np.diff(self._read(number, "offsets", mapped=False))
            # A damaged file may have a negative one, for whoever reads the row to find.
            self._indexed[number] = lengths.astype(
                np.result_type(*map(np.min_scalar_type, (lengths.min(), lengths.max())))
            )
        return self._indexed[number][rows]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [L] and the raw latent float32 [D] of a sample.

        A text that is not there is of mask tokens, a latent that is not there of NaN.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard, row = self._shard(number), index - int(self._starts[number])
        start, stop = shard["offsets"][row : row + 2].tolist()
        # An id outside the vocabulary would surface much later, as a device-side assertion that names nothing.
        whole = 0 < stop - start <= self.info.max_length
        if whole and "tokens" in shard:
            ids = shard["tokens"][start:stop].astype(np.int64)
            whole = len(ids) == stop - start and ids.max() < self.info.vocab_size
        elif whole:
            ids = np.full(stop - start, self.info.mask_token_id, np.int64)
        if not whole:
            raise UserError(
                f"{self.directory / shard_file(self.split, number, 'tokens')}: row {row} is corrupt; "
                "copy the dataset again or prepare it again (data.verify_hashes=true checks every file)"
            )
        if "latents" in shard:
            return ids, np.array(shard["latents"][row], np.float32)
        return ids, np.full(self.info.latent_dim, np.nan, np.float32)

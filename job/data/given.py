"""Latents that the user has already: --latents FILE.npy beside the texts, or --latents-key COLUMN within the records.

Row i belongs to text i of the sources in reading order, an empty one counted too: whoever made the embeddings went
through the records as they are. Which texts are kept, and in what order, is decided by the texts alone as ever; each
then looks up its own row. Of equal texts, the first one's latent is kept with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from job.data.console import say
from job.data.encoders import GIVEN
from job.data.options import Options
from job.data.source_files import Entry, contents
from job.data.sources import Sample, read_samples
from job.errors import UserError

CHECKED_ROWS = 4096  # rows of the file looked at together


class GivenEncoder:
    """Gives each text of a shard the latent that came with it."""

    def __init__(self, texts: Sequence[str], latents: np.ndarray) -> None:
        self.description: dict[str, Any] = {"name": GIVEN}
        self.latents = latents
        self._row = {text: row for row, text in enumerate(texts)}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), D]."""
        return np.asarray(self.latents[[self._row[text] for text in texts]], np.float32)


class GivenLatents:
    """Reads the texts of the sources, and knows the latent of each.

    Latents within records are written to `spill` as they are read, float32, so that memory holds none of them; without
    one they are only checked.
    """

    def __init__(self, options: Options, file: Path | None, spill: Path | None = None) -> None:
        """`file` is where the one of --latents is, which may be a copy of what that names."""
        self.options = options
        self.count = 0  # texts read, empty ones too
        self.empty = 0
        self.width = 0  # dimensions
        self._spill = spill
        self._zero: set[int] = set()  # numbers of the texts whose record has a latent of zeros
        self._first: np.ndarray | None = None  # the first latent within a record
        self._differ = False  # whether the latents do, as far as they were read
        self._rows: np.ndarray | None = None
        if file is not None:
            self._rows, self._differ = _read_file(str(options.latents), file)
            self.width = self._rows.shape[1]

    def texts(self) -> Generator[tuple[int, str], None, None]:
        """The texts of the sources with their numbers, none empty. To its end, or closed, before `pick`.

        UserError for a latent that is none, and where there is not one for every text.
        """
        if self._spill is None:
            yield from self._read(None)
            return
        self._spill.parent.mkdir(parents=True, exist_ok=True)
        with self._spill.open("wb") as file:
            yield from self._read(file)

    def _read(self, spill: BinaryIO | None) -> Generator[tuple[int, str], None, None]:
        options = self.options
        for sample in read_samples(
            options.source, text_key=options.text_key, hf_split=options.hf_split, latents_key=options.latents_key
        ):
            row = self.count
            self.count += 1
            if self._rows is None:
                latent = self._latent_of(sample)
                self._first = latent if self._first is None else self._first
                self._differ = self._differ or not np.array_equal(latent, self._first)
                if not latent.any():
                    self._zero.add(row)
                if spill:
                    spill.write(latent.tobytes())
            elif row >= len(self._rows):
                raise UserError(
                    f"--latents {options.latents}: {row} rows, so none for text {row + 1} ({sample.where}); "
                    "give a row for every text, in reading order"
                )
            if sample.text:
                yield row, sample.text
            else:
                self.empty += 1
        if self._rows is not None and len(self._rows) != self.count:
            raise UserError(
                f"--latents {options.latents}: {len(self._rows)} rows, but the sources have {self.count} texts "
                f"({self.empty} of them empty), so row {self.count + 1} has none; "
                "give a row for every text, in reading order"
            )
        if self.count > 1 and not self._differ:
            named = f"--latents-key {options.latents_key}" if self._rows is None else f"--latents {options.latents}"
            say(f"warning: {named}: all latents are equal, so a model can learn nothing from them")

    def _latent_of(self, sample: Sample) -> np.ndarray:
        """float32 [D]. UserError that names the record where it is none."""
        problem = f"{sample.where}: the value of {self.options.latents_key!r} is"
        try:
            latent = np.asarray(sample.latent)
        except ValueError:  # lists of several lengths
            latent = np.asarray(None)
        if latent.ndim != 1 or latent.dtype.kind not in "fiu" or not latent.size:
            raise UserError(f"{problem} not a list of numbers; name the key of the latent with --latents-key")
        self.width = self.width or len(latent)
        if len(latent) != self.width:
            raise UserError(f"{problem} a list of {len(latent)} numbers, but those before it have {self.width}")
        latent = _as_float32(latent)
        if not np.isfinite(latent).all():
            raise UserError(f"{problem} not finite; every number must be, in 32 bits")
        return latent

    def zero_count(self, numbers: Sequence[int]) -> int:
        """How many of the texts with these numbers have the latent zero."""
        if self._rows is None:
            return sum(number in self._zero for number in numbers)
        return int((~self.pick(numbers).any(1)).sum())

    def pick(self, numbers: Sequence[int]) -> np.ndarray:
        """The latents float32 [len(numbers), D] of the texts with these numbers."""
        if self._rows is None:
            assert self._spill
            self._rows = np.memmap(self._spill, np.float32, "r").reshape(-1, self.width)
        return np.asarray(self._rows[np.array(numbers, np.int64)], np.float32)


def _as_float32(numbers: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinite then, which is looked for
        return np.asarray(numbers, np.float32)


def _read_file(name: str, path: Path) -> tuple[np.ndarray, bool]:
    """The latents [N, D] of a file, not in memory, and whether they differ.

    UserError when they are none, or not all finite.
    """
    try:
        latents: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)  # a pickle could run code
    except OSError as error:
        raise UserError(f"--latents {name}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"--latents {name}: damaged, or not a file of numpy ({error})") from error
    if not isinstance(latents, np.ndarray):
        raise UserError(f"--latents {name}: an archive of several arrays; give a file of one, .npy [rows, dimensions]")
    if latents.ndim != 2 or not latents.size or latents.dtype.kind not in "fiu":
        raise UserError(
            f"--latents {name}: {latents.dtype} of shape {list(latents.shape)}, not numbers of [rows, dimensions]"
        )
    differ = False
    for start in range(0, len(latents), CHECKED_ROWS):
        rows = _as_float32(latents[start : start + CHECKED_ROWS])
        differ = differ or not bool((rows == _as_float32(latents[0])).all())
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise UserError(
                f"--latents {name}: row {row + 1} (index {row}) holds a number that is not finite in 32 bits"
            )
    return latents, differ


def description(options: Options, files: Sequence[Entry], file: Path | None) -> dict[str, Any]:
    """What dataset.json says of the encoder of given latents; `sha256` is of their file, or of all their files.

    `file` is where the one of --latents is, which may be a copy of what that names.
    """
    if file is not None:
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
        return {"name": GIVEN, "file": PurePosixPath(str(options.latents)).name, "sha256": digest.hexdigest()}
    of_files = repr(
        (
            options.latents_key,
            [entry.get("sha256") or entry.get("version") or entry["name"] for entry in contents(files)],
        )
    )
    return {"name": GIVEN, "key": options.latents_key, "sha256": hashlib.sha256(of_files.encode()).hexdigest()}

"""Texts and latents in files: what `cyclevae encode` and `cyclevae decode` read and write.

texts.txt         a text a line
texts.jsonl       an object a line, the text under "text" (--text-key)
latents.npy       numpy array [N, D]
latents.jsonl     an object a line: "latent", a list of D numbers, and "length", the tokens of its text, if known
-                 standard input or output: texts a line each, or latents as in .jsonl
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from job.errors import UsageError, UserError
from job.files import not_utf8, write_whole

STANDARD = "-"
NO_LINES = (".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")  # job.prepare reads them, as what they are
NPY_MAGIC = b"\x93NUMPY"


def _content(name: str) -> bytes:
    """All of a file, or of standard input."""
    if name == STANDARD and sys.stdin is None:
        raise UserError("standard input: it is closed")
    try:
        return sys.stdin.buffer.read() if name == STANDARD else Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"{_shown(name)}: {error.strerror or error}") from error


def _shown(name: str) -> str:
    return "standard input" if name == STANDARD else name


def _write(name: str, content: bytes) -> None:
    """Write a file, whole or not at all, or to standard output. UserError where it cannot be written."""
    try:
        if name == STANDARD:
            _write_standard(content)
        else:
            write_whole(Path(name), lambda file: file.write(content))
    except BrokenPipeError:  # `... | head`: the command ends without a word
        raise
    except OSError as error:
        shown = "standard output" if name == STANDARD else name
        raise UserError(f"{shown}: {error.strerror or error}") from error


def _write_standard(content: bytes) -> None:
    """Write to standard output. Its text stream would lose what it cannot write (job.output); here it is the result."""
    if getattr(sys.stdout, "missing", False):
        raise UserError("standard output: it is closed")
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def say_written(what: str, name: str) -> None:
    """Tell on standard error what was written; nothing of standard output, where it is seen."""
    if name != STANDARD:
        print(f"{what} in {name}", file=sys.stderr)


def refuse_output(name: str, suffixes: Sequence[str]) -> None:
    """UserError for a file that cannot be written, or whose name's ending says none of the formats.

    Said before a model is loaded and hours of work are lost.
    """
    if name == STANDARD:
        return
    path = Path(name)
    there = next(place for place in path.absolute().parents if place.exists())
    if path.is_dir() or not there.is_dir() or not os.access(path if path.exists() else there, os.W_OK):
        raise UserError(f"{name}: no file can be written there; give another name")
    if suffixes and path.suffix not in suffixes:
        raise UserError(
            f"{name}: give a name that ends with {' or '.join(suffixes)}, or - for standard input or output"
        )


def refuse_same(read: Sequence[str], written: Sequence[str]) -> None:
    """UserError where a file would be written that is read, or written twice."""
    taken: list[Path | str] = [Path(name).resolve() for name in read if name != STANDARD]
    for name in written:
        if name != STANDARD and Path(name).exists() and not Path(name).is_file():
            continue  # such as /dev/null
        place = name if name == STANDARD else Path(name).resolve()
        if place in taken:
            raise UserError(f"{name}: it would be written over; give each file a name of its own")
        taken.append(place)


def _lines(name: str, content: bytes) -> list[str]:
    try:
        # Not splitlines: it also splits at characters, such as U+2028, that may stand inside a text.
        text = content.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{_shown(name)}: {not_utf8(error)}") from error
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def _objects(name: str, content: bytes, key: str) -> list[dict[str, Any]]:
    """The objects of JSON lines, each with `key`."""
    objects = []
    for number, line in enumerate(_lines(name, content), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or key not in value:
            raise UserError(f'{_shown(name)}: line {number} is no JSON object with "{key}"')
        objects.append(value)
    return objects


def read_texts(name: str, key: str = "text") -> list[str]:
    """Texts of a .jsonl file, or of the lines of another file or of standard input. UserError for a table's file."""
    ending = Path(name).suffix.lower()
    if ending in NO_LINES:
        raise UserError(f"{name}: texts are read as lines, or from .jsonl; write them to such a file")
    content = _content(name)
    if ending not in (".jsonl", ".ndjson"):
        return _lines(name, content)
    texts = [value[key] for value in _objects(name, content, key)]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise UserError(f'{name}: "{key}" of line {number} is no text')
    return texts


def write_texts(name: str, texts: Sequence[str]) -> None:
    """Write texts as .jsonl, or a line each; there a line break inside a text becomes a space."""
    if Path(name).suffix == ".jsonl":
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    else:
        lines = [" ".join(text.splitlines()) for text in texts]
    _write(name, "".join(line + "\n" for line in lines).encode())


def read_latents(name: str) -> tuple[np.ndarray, list[int] | None]:
    """Latents [N, D] of an .npy file or of JSON lines, and the tokens of their texts where every line says them."""
    content = _content(name)
    if content.startswith(NPY_MAGIC) or Path(name).suffix == ".npy":
        return _read_array(name, content), None
    objects = _objects(name, content, "latent")
    try:
        latents = np.array([value["latent"] for value in objects], np.float32)
        lengths = [int(value["length"]) for value in objects] if all("length" in v for v in objects) else None
    except (TypeError, ValueError) as error:
        raise UserError(f"{_shown(name)}: latents are not lists of numbers of one length ({error})") from error
    return latents, lengths


def _read_array(name: str, content: bytes) -> np.ndarray:
    try:
        # A pickle could run code.
        array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{_shown(name)}: damaged, or not a file of numpy ({error})") from error
    return array


def write_latents(name: str, latents: np.ndarray, lengths: Sequence[int]) -> None:
    """Write latents [N, D] as .npy, or as JSON lines with the tokens of their texts."""
    if Path(name).suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, latents, allow_pickle=False)
        _write(name, buffer.getvalue())
        return
    # float32 as the shortest text that gives the same float32 back.
    rows = ([float(str(number)) for number in row] for row in latents)
    lines = [json.dumps({"latent": row, "length": length}) for row, length in zip(rows, lengths, strict=True)]
    _write(name, "".join(line + "\n" for line in lines).encode())


def read_lengths(name: str) -> int | np.ndarray:
    """Token counts: a number for all texts, or a file with one a line (.txt) or as an array (.npy).

    UsageError for a number that no text has.
    """
    if re.fullmatch(r"[+-]?\d+", name):
        if int(name) < 1:
            raise UsageError(f"--lengths {name}: give at least 1, or a file")
        return int(name)
    content = _content(name)
    if content.startswith(NPY_MAGIC):
        return _read_array(name, content)
    try:
        return np.array([int(line) for line in _lines(name, content)], np.int64)
    except ValueError as error:
        raise UserError(f"{_shown(name)}: not a number of tokens a line ({error})") from error


def write_lengths(name: str, lengths: Sequence[int]) -> None:
    """Write token counts, one a line."""
    _write(name, "".join(f"{length}\n" for length in lengths).encode())

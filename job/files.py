"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"
LONGEST_NAME = 150  # bytes; file systems take 255, and names are parts of other names


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write beside, fsync, rename, fsync the directory: after a crash `path` holds either the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()))


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of one a line, none without the file; a line that a kill cut short, or that is being written, is left out."""
    objects = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return objects


def file_name(text: str) -> str:
    """`text` as the name of a directory: no slashes, at most LONGEST_NAME bytes (the end of a longer one becomes a digest)."""
    name = text.replace("/", "_").encode()
    return (
        name
        if len(name) <= LONGEST_NAME
        else name[: LONGEST_NAME - 9] + b"-" + hashlib.sha256(name).hexdigest()[:8].encode()
    ).decode(errors="ignore")


def file_entry(path: Path) -> dict[str, Any]:
    """What dataset.json keeps of a file: its SHA-256 and its size in bytes."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def write_below(root: Path, files: Mapping[str, str]) -> None:
    """Write texts by their paths below a directory."""
    for name, text in files.items():
        write_text(root / name, text)

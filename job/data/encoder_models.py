"""Models by name or directory: what the encoders of both libraries that have such say of theirs, and refuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.errors import UserError


def noted_directory(model: str) -> dict[str, str]:
    """An encoder's description of where its model lies, if in a directory: its name may be relative to another one."""
    return {"directory": str(Path(model).resolve())} if Path(model).is_dir() else {}


def described_model(description: Mapping[str, Any]) -> str:
    """The model that a description names: its directory where that is here, else its name."""
    directory = description.get("directory")
    return str(directory if directory and Path(directory).is_dir() else description["model"])


def refuse_wider(model: str, truncate_dim: int | None, width: int) -> None:
    """UserError for more dimensions than a model has: the libraries keep quiet about it, and so would dataset.json."""
    if truncate_dim and truncate_dim > width:
        raise UserError(
            f"--truncate-dim {truncate_dim}: {model} has only {width} dimensions; give fewer or leave it out"
        )


def refuse_other(found: Mapping[str, Any], description: Mapping[str, Any], where: str) -> None:
    """UserError where an encoder is found to be another one than described; data of older versions does not say."""
    wanted = description.get("sha256")
    if wanted and found["sha256"] != wanted:
        raise UserError(
            f"{where}: not the encoder that made the latents (SHA-256 {found['sha256'][:12]}..., "
            f"theirs was {wanted[:12]}...)"
        )

"""Versions of packages, and of this program, which may run from a checkout that is not installed."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path


def installed_version(package: str) -> str | None:
    """Version of a package; None: it is not installed, as this one where it runs from a checkout on PYTHONPATH."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def program_version() -> str:
    """What `--version` prints. Of a checkout that is not installed, the version stands in its pyproject.toml."""
    if installed := installed_version("cyclevae"):
        return f"cyclevae {installed}"
    checkout = Path(__file__).resolve().parent.parent
    try:
        version = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["version"]
    except FileNotFoundError:
        version = "of an unknown version"
    return f"cyclevae {version} (not installed; it runs from {checkout})"

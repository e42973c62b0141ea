"""environment.json: what a run ran on."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from job.config import Config, to_dict
from job.files import write_json, write_text
from job.versions import installed_version

PACKAGES = ("torch", "mmdit", "hyper-connections", "x-transformers", "hydra-core", "numpy", "tokenizers")


def source() -> dict[str, str]:
    """`revision` of the code (with -dirty when changed), and when an image's package was built (ISO 8601).

    The Dockerfile writes build.json into the package; in a checkout git is asked. Empty strings where nobody knows.
    """
    package = Path(__file__).resolve().parent.parent
    if (package / "build.json").exists():
        made: dict[str, str] = json.loads((package / "build.json").read_text())
        return made
    revision = ""
    if (package.parent / ".git").exists():
        command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            revision = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return {"revision": revision, "built": ""}


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions, commit, command line, working directory and device of this process."""
    code = source()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "version": installed_version("cyclevae"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "git_commit": code["revision"] or None,
        "built": code["built"] or None,
        "command": sys.argv,
        "directory": str(Path.cwd()),
        "device": device.type,
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def write_description(config: Config, run_dir: Path, device: torch.device, world_size: int) -> None:
    """Write config.yaml and environment.json of a run directory."""
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(to_dict(config)))
    write_json(run_dir / "environment.json", environment(device, world_size), indent=2)

"""environment.json: what a run ran on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "mmdit", "hyper-connections", "x-transformers", "hydra-core", "numpy", "tokenizers")


def git_commit() -> str | None:
    """Commit of the checkout this package runs from (with -dirty when changed), None when installed elsewhere."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def job_id() -> str:
    """The scheduler's number of this job, for people who look for it there; `local` without a scheduler."""
    return os.environ.get("SLURM_JOB_ID", "local")


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions, commit, command line and device of this process."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "version": metadata.version("cyclevae"), "python": platform.python_version(),
        "platform": platform.platform(), "packages": {name: metadata.version(name) for name in PACKAGES},
        "git_commit": git_commit(), "command": sys.argv, "device": device.type, "gpu": gpu, "cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(), "world_size": world_size,
    }

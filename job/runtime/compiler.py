"""What torch.compile needs of a machine besides PyTorch."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from job.errors import UserError


def refuse_without_compiler(device: torch.device) -> None:
    """UserError where what PyTorch generates could not be built: a C compiler for GPUs (Triton's launchers), a C++ compiler for CPUs, Python's headers."""
    variable, names, package = (
        ("CC", ("gcc", "clang", "cc"), "gcc") if device.type == "cuda" else ("CXX", ("g++",), "g++")
    )
    named = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([named] if named else names)):
        raise UserError(
            f"training.compile_model=true needs a compiler: {named or package} is not installed; install {package} and python3-dev, "
            f"let {variable} name one, or leave the key out"
        )
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        raise UserError(
            f"training.compile_model=true needs Python's headers, which {headers} does not have; install python3-dev, or leave the key out"
        )

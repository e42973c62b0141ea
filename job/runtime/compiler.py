"""What torch.compile needs of a machine besides PyTorch."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from job.errors import UserError
from job.runtime.launcher_variables import named_compiler


def refuse_without_compiler(device: torch.device) -> None:
    """Raise UserError where the code that torch.compile generates could not be built.

    Without this the first step fails, minutes into the run, in a traceback of several pages. On GPUs Triton's launchers
    are C, on CPUs the kernels are C++; both need Python's headers.
    """
    if device.type == "cuda":
        variable, package, names = "CC", "gcc", ["gcc", "clang", "cc"]
    else:
        variable, package, names = "CXX", "g++", ["g++"]
    named = named_compiler(os.environ, variable)
    if not any(shutil.which(name) for name in ([named] if named else names)):
        raise UserError(
            f"training.compile_model=true needs a compiler: {named or package} is not installed; install {package} and "
            f"python3-dev, let {variable} name one, or leave the key out"
        )
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        raise UserError(
            f"training.compile_model=true needs Python's headers, which {headers} does not have; install python3-dev, "
            "or leave the key out"
        )

"""Write the image's locks anew: `python docker/lock.py` (make lock), with uv and the package index it is set up for.

Every line has the hashes of all files of its version. Versions are those of requirements.lock; what only PyTorch's
builds for CUDA need comes on top. torch.lock (PyTorch and CUDA) and requirements.lock (the rest) are layers of their
own, since PyTorch's gigabytes change rarely; build.lock is what builds the wheels.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHONS = ("3.11", "3.12")  # of Debian 12 and Ubuntu 24.04
CUDA = re.compile(r"(torch==|triton==|cuda-|nvidia-(?!ml-py))")
HEADER = "# Written by docker/lock.py (make lock).\n"


def resolve(requirements: list[str], python: str, *options: str) -> list[str]:
    """The entries of a lock for Linux on x86-64, one string with its hashes each."""
    command = ["uv", "pip", "compile", "-", "--quiet", "--no-config"]
    command += ["--generate-hashes", "--no-annotate", "--no-header"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28", *options]
    text = subprocess.run(command, input="\n".join(requirements), stdout=subprocess.PIPE, text=True, check=True).stdout
    return re.findall(r"^[^\s#].*(?:\n +--hash.*)*\n", text, re.MULTILINE)


def main() -> None:
    """Write the three locks. One set must do for every Python that a base image may have."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
    versions = ("--constraints", str(HERE.parent / "requirements.lock"))
    locks: dict[str, list[str]] = {}
    for python in PYTHONS:
        entries = resolve(project["project"]["dependencies"], python, *versions)
        new = {
            "torch.lock": [entry for entry in entries if CUDA.match(entry)],
            "requirements.lock": [entry for entry in entries if not CUDA.match(entry)],
            "build.lock": resolve(project["build-system"]["requires"], python),
        }
        if locks and new != locks:
            raise SystemExit(f"Python {PYTHONS[0]} and {python} need different packages: give each locks of its own")
        locks = new
    for name, entries in locks.items():
        (HERE / name).write_text(HEADER + "".join(entries))


if __name__ == "__main__":
    main()

"""Launchers are rooms beside each other: what two of them need stands in job/launch. Nothing heavy is loaded early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent.parent / "job" / "launch"
ROOMS = sorted(path.name for path in LAUNCH.iterdir() if (path / "__init__.py").exists())
FILES = sorted(LAUNCH.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of what a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_rooms() -> None:
    assert ROOMS == ["kubernetes", "local", "slurm"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_a_room_imports_nothing_of_another_and_owns_its_client(path: Path) -> None:
    own = path.relative_to(LAUNCH).parts[0]
    names = imported(path)
    for room in ROOMS:
        if room != own:
            assert not {name for name in names if name.startswith(f"job.launch.{room}")}, path
    for library, owner in {"submitit": "slurm", "kubernetes": "kubernetes", "yaml": "kubernetes"}.items():
        if own != owner:
            assert library not in {name.split(".")[0] for name in names}, path


def test_the_launchers_do_not_import_torch() -> None:
    """They answer at once, also on a login node."""
    modules = [
        "job.slurm",
        "job.k8s",
        *(f"job.{path.relative_to(LAUNCH.parent).with_suffix('').as_posix().replace('/', '.')}" for path in FILES),
    ]
    loads = f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}]"
    code = f"{loads}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=LAUNCH.parent.parent).returncode == 0


@pytest.mark.parametrize("command", ["slurm", "k8s"])
def test_a_command_imports_no_client_before_a_verb_needs_it(command: str) -> None:
    heavy = {"submitit", "kubernetes"}
    code = f"import sys, job.{command}; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=LAUNCH.parent.parent, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr

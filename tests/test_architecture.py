"""The rules of the house that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from job import config

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "job").rglob("*.py"))

# What a room may import of the others. The way of the data is config <- model <- objective <- train; runtime and
# monitoring stand beside it and know neither, and nothing on it knows who launched it. The rooms within launch are held
# apart by tests/launch/test_rooms.py.
MAY_IMPORT = {
    "model": {"config", "errors", "files", "model"},
    "objective": {"config", "errors", "model", "objective", "row_kinds"},
    "data": {"checkpoint_names", "config", "errors", "files", "data", "row_kinds"},
    "lgdlm": {"checks", "config", "data", "errors", "files", "lgdlm", "model"},
    "runtime": {"checkpoint_names", "config", "errors", "failure_records", "files", "runtime"},
    "pages": {"errors", "files", "pages"},
    "monitoring": {
        "checkpoint_names",
        "config",
        "errors",
        "files",
        "metric_names",
        "monitoring",
        "row_kinds",
        "versions",
    },
    "health": {
        "checkpoint_names",
        "checks",
        "comparison",
        "config",
        "config_checks",
        "errors",
        "files",
        "health",
        "lgdlm",
        "model",
        "monitoring",
        "runtime",
        "trained",
    },
    "planning": {
        "batch_sizes",
        "benchmarking",
        "config",
        "data",
        "errors",
        "files",
        "model",
        "monitoring",
        "objective",
        "planning",
        "runtime",
    },
    "comparison": {"command", "comparison", "config", "errors", "files", "metric_names", "pages", "tables"},
    "launch": {
        "checks",
        "comparison",
        "metric_names",
        "tables",
        "batch_sizes",
        "checkpoint_names",
        "command",
        "config",
        "config_checks",
        "errors",
        "failure_records",
        "files",
        "launch",
    },
}
# One owner each.
OWNERS = {
    "hydra": {"config", "command", "train", "launch"},
    "submitit": {"launch"},
    "kubernetes": {"launch"},
    "prometheus_client": {"monitoring"},
    "mmdit": {"model"},
    "sklearn": {"data"},
    "tokenizers": {"data"},
    "duckdb": {"data"},
    "ray": {"data"},
    "jinja2": {"pages"},
    "plotly": {"pages"},
}


def room(path: Path) -> str:
    return path.relative_to(ROOT / "job").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | ({f"job.{alias.name}" for alias in node.names} if node.module == "job" else set())
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "job" and rest and room(path) in MAY_IMPORT:
            assert rest[0] in MAY_IMPORT[room(path)], f"{path} imports {name}"
        if top in OWNERS:
            assert room(path) in OWNERS[top], f"{path} imports {name}"
        if top == "torch":
            assert room(path) not in ("launch", "comparison"), f"{path} imports torch"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_environment_variables_have_one_reader(path: Path) -> None:
    text = path.read_text()
    if room(path) in ("objective", "model"):
        assert "environ" not in text
    if room(path) != "launch" and path.name != "launcher_variables.py":
        assert not re.search(r"getenv|environ(\[|\.get|\.setdefault|\.update|\.pop)", text)


def test_every_configuration_key_is_read() -> None:
    """A key is read where its name is an attribute of something, outside the schema itself."""
    read = {
        node.attr
        for path in FILES
        if path.name not in ("config.py", "config_checks.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    in_config = {
        "loss.allow_degenerate_epsilon",
        "model.cluster_size",
        "optimizer.name",
        "monitoring.targets_dir",
    }  # by functions of the schema
    in_yaml = {"logging.run_name", "logging.save_dir"}  # configs/base.yaml makes hydra.run.dir of them
    unread = {name for name in list(config.keys()) if name.split(".")[1] not in read} - in_config - in_yaml
    assert not unread


def test_the_command_line_starts_without_torch() -> None:
    """`cyclevae` and the launchers answer at once, also on a login node."""
    code = "import sys, job.__main__, job.config, job.command, job.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

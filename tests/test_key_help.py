"""`python -m job.train --help` names every key and configuration, in lines that a terminal shows whole."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from job.config import keys
from job.errors import UsageError
from job.key_help import about, overview
from job.versions import program_version

ROOT = Path(__file__).parent.parent


def test_every_key_and_configuration_is_listed() -> None:
    text = overview()
    for name in keys():
        section, key = name.split(".")
        assert f"\n  {key}=" in text.partition(f"\n{section}.*: ")[2], name
    for configuration in ("demo", "mmdit_cycle_vae", "mmdit_cycle_vae_cluster", "mmdit_stable"):
        assert f"\n  {configuration} " in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 160


def test_a_key_or_a_section_is_told_in_full() -> None:
    assert about("loss.cycle_text_weight").splitlines()[0] == "loss.cycle_text_weight=0.1"
    assert "read only with loss.loss_type=cycle_vae" in about("loss.cycle_text_weight")
    assert "one of auto, cpu, cuda" in about("training.device")
    assert about("optimizer").count("\noptimizer.") + 1 == sum(name.startswith("optimizer.") for name in keys())
    with pytest.raises(UsageError, match="did you mean optimizer"):
        about("optimiser")


@pytest.mark.parametrize("module", [["job.train"], ["job", "train"]])
def test_help_comes_without_loading_torch(module: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", *module, "--config-name", "demo", "data.dir=x", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m job.train")
    assert " torch\n" not in done.stderr


@pytest.mark.parametrize("module", [["job"], ["job.train"], ["job", "train"]])
def test_version(module: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *module, "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"cyclevae {metadata.version('cyclevae')}\n"


def test_the_version_of_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_knows(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nobody_knows)
    said = program_version()
    assert re.fullmatch(rf"cyclevae \d[\w.]* \(not installed; it runs from {ROOT}\)", said), said

"""The image holds the versions that everybody else installs, and everything of them is checked by hash."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def versions(path: Path) -> dict[str, str]:
    """Version by normalized name, of every line of a lock."""
    return {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), re.MULTILINE)
    }


def test_the_image_has_the_versions_of_the_lock() -> None:
    everybody = versions(ROOT / "requirements.lock")
    image, torch = versions(ROOT / "docker/requirements.lock"), versions(ROOT / "docker/torch.lock")
    assert not set(image) & set(torch)
    beyond = {name for name in image | torch if name not in everybody}
    assert {name: version for name, version in (image | torch).items() if name not in beyond} == everybody, "make lock"
    assert beyond <= set(torch), "only what PyTorch needs for CUDA may come on top: make lock"


def test_the_wheel_is_built_with_what_pyproject_names() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert [f"{name}=={version}" for name, version in versions(ROOT / "docker/build.lock").items()] == wanted


def test_every_entry_has_its_hashes() -> None:
    for path in (ROOT / "docker").glob("*.lock"):
        entries = re.split(r"\n(?=\S)", path.read_text())[1:]
        assert entries
        assert all(entry.count("--hash=sha256:") >= 1 for entry in entries), path

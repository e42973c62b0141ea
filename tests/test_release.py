"""`make release` finds what is of another version."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "docker" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_names_the_image_names_this_version(release: ModuleType) -> None:
    version = release.version_of(ROOT)
    assert release.naming_problems(ROOT, version) == []
    found = release.naming_problems(ROOT, "9.9.9")
    named = {problem.split(":")[0] for problem in found}
    assert {
        "docker/compose.yaml",
        "k8s/overlays/cpu-demo/kustomization.yaml",
        "k8s/runtime/kustomization.yaml",
    } <= named
    assert all(f"names version {version}, pyproject.toml has 9.9.9" in problem for problem in found)


def test_the_changelog_must_have_the_version_and_its_date(release: ModuleType, tmp_path: Path) -> None:
    changelog = tmp_path / "CHANGELOG.md"
    for text in ("# Changelog\n", "## Unreleased\n\n## 1.2.0 (2026-11-26)\n", "## 1.2.0\n", "## 1.2.01 (2026-11-26)\n"):
        changelog.write_text(text)
        assert len(release.changelog_problems(tmp_path, "1.2.0")) == 1
    changelog.write_text("# Changelog\n\n## 1.2.0 (2026-11-26)\n\n- x\n\n## 1.1.0 (2026-01-01)\n")
    assert release.changelog_problems(tmp_path, "1.2.0") == []


def test_a_wheel_says_its_version_and_has_all(release: ModuleType, tmp_path: Path) -> None:
    def wheel(version: str, names: tuple[str, ...]) -> Path:
        path = tmp_path / "cyclevae.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "")
            archive.writestr(
                "cyclevae.dist-info/METADATA", f"Metadata-Version: 2.4\nName: cyclevae\nVersion: {version}\n"
            )
        return path

    assert release.wheel_problems(wheel("1.2.0", release.IN_WHEEL), "1.2.0") == []
    assert len(release.wheel_problems(wheel("1.1.0", release.IN_WHEEL), "1.2.0")) == 1
    assert len(release.wheel_problems(wheel("1.2.0", release.IN_WHEEL[1:]), "1.2.0")) == 1
    assert len(release.wheel_problems(wheel("1.2.0", (*release.IN_WHEEL, "tests/a.py")), "1.2.0")) == 1


def test_an_image_must_be_here_and_of_this_commit(release: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: dict[str, str] = {}
    monkeypatch.setattr(release, "label", lambda image, name: labels.get(name))
    assert "make image" in release.image_problems("1.2.0", "abc")[0]
    labels.update(version="1.2.0", revision="abc")
    assert release.image_problems("1.2.0", "abc") == []
    assert len(release.image_problems("1.2.0", "def")) == 1
    labels["version"] = "1.1.0"
    assert len(release.image_problems("1.2.0", "abc")) == 1


def test_pre_commit_runs_what_ci_lints() -> None:
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    tools = re.findall(r"\$\(BIN\)/(.*?)(?: \$\(SOURCES\))?$", lint.group(1), re.MULTILINE)
    assert tools == ["ruff check", "ruff format --check", "mypy"]
    for tool in tools:
        assert f".venv/bin/{tool}" in hooks


def test_the_sources_are_looked_at_before_anything_is_built(
    release: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a changelog lacks is told in a second, and not after a test suite and an image."""
    monkeypatch.setattr(release, "build_wheel", lambda _: pytest.fail("built a wheel"))
    monkeypatch.setattr(release, "changelog_problems", lambda *_: ["CHANGELOG.md: lacks it"])
    assert release.main(["--sources"]) == 1
    assert "CHANGELOG.md: lacks it" in capsys.readouterr().out
    recipe = (ROOT / "Makefile").read_text().partition("\nrelease:")[2].partition("\n\n")[0]
    assert recipe.index("release.py --sources") < recipe.index("$(MAKE) lint test image")

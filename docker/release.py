"""What a release is made of must be of one version: `python docker/release.py` (make release, after the tests).

`--sources` looks at what needs no build alone, before a test suite and an image take their time.
It compares pyproject.toml, the changelog, the manifests and commands that name the image, the wheel (which it builds
into dist/) and the image (which `make image` built), prints what does not fit, and changes nothing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LABELS = "org.opencontainers.image"
# Whatever names the image, and the files that may.
NAMED = re.compile(r"\bcyclevae:(\d[\w.]*\w)|^\s*newTag: (\S+)", re.MULTILINE)
NAMING = ("README.md", "docker/**/*.md", "docker/*.yaml", "k8s/**/*.md", "k8s/**/*.yaml", "docs/**/*.md")
# A file of each kind that a wheel must have; the tests stay out of it.
IN_WHEEL = (
    "job/train.py",
    "job/configs/demo.yaml",
    "job/launch/slurm/batch.sh",
    "hydra_plugins/cyclevae_slurm/__init__.py",
)


def version_of(root: Path) -> str:
    """The version of pyproject.toml, which all else must have."""
    return str(tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"])


def changelog_problems(root: Path, version: str) -> list[str]:
    """The newest entry of the changelog must be of this version, with its date."""
    newest = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    name = newest.group(1) if newest else "nothing"
    if re.fullmatch(re.escape(version) + r" \(\d{4}-\d\d-\d\d\)", name):
        return []
    return [f"CHANGELOG.md: its newest entry is {name!r}; a release has '## {version} (YYYY-MM-DD)' there"]


def naming_problems(root: Path, version: str) -> list[str]:
    """Manifests, compose files and commands that name an image of another version."""
    problems = []
    for path in sorted({path for pattern in NAMING for path in root.glob(pattern) if "_build" not in path.parts}):
        text = path.read_text()
        for found in NAMED.finditer(text):
            named = found.group(1) or found.group(2)
            if named != version:
                line = text.count("\n", 0, found.end()) + 1
                problems.append(f"{path.relative_to(root)}:{line}: names version {named}, pyproject.toml has {version}")
    return problems


def wheel_problems(wheel: Path, version: str) -> list[str]:
    """What a wheel says of itself, and what is in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = [name for name in names if name.endswith(".dist-info/METADATA")]
        said = message_from_bytes(archive.read(metadata[0]))["Version"] if metadata else None
    problems = [f"{wheel.name}: lacks {name}" for name in IN_WHEEL if name not in names]
    if said != version:
        problems.append(f"{wheel.name}: its metadata say version {said}, pyproject.toml has {version}")
    if any(name.startswith("tests/") for name in names):
        problems.append(f"{wheel.name}: has the tests in it")
    return problems


def build_wheel(root: Path) -> Path:
    """The wheel of a checkout, in its dist/."""
    out = root / "dist"
    for made in (out, root / "build"):  # files of an earlier build would go into this one
        shutil.rmtree(made, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(root)], check=True)
    return next(out.glob("*.whl"))


def label(image: str, name: str) -> str | None:
    """A label of an image here; None when no builder has it."""
    for builder, command, place in (
        ("docker", ["image", "inspect"], ".Config.Labels"),
        ("podman", ["image", "inspect"], ".Config.Labels"),
        ("buildah", ["inspect", "--type", "image"], ".OCIv1.Config.Labels"),
    ):
        if shutil.which(builder):
            template = f'{{{{index {place} "{LABELS}.{name}"}}}}'
            asked = [builder, *command, "--format", template, image]
            done = subprocess.run(asked, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout.strip()
    return None


def image_problems(version: str, commit: str) -> list[str]:
    """The image must be here, and built of this commit."""
    image = f"cyclevae:{version}"
    said, revision = label(image, "version"), label(image, "revision")
    if said is None:
        return [f"{image}: no such image here; build it with `make image`"]
    problems = []
    if said != version:
        problems.append(f"{image}: its label says version {said}")
    if revision != commit:
        problems.append(f"{image}: was built of commit {revision}, this is {commit}; build it again with `make image`")
    return problems


def main(arguments: Sequence[str]) -> int:
    """Print what does not fit; exit code 1 if anything does not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sources", action="store_true", help="version, changelog, manifests and commit alone")
    sources_alone = parser.parse_args(arguments).sources
    version = version_of(ROOT)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    problems = [*changelog_problems(ROOT, version), *naming_problems(ROOT, version)]
    fit = "changelog and manifests fit together"
    if not sources_alone:
        problems += [*wheel_problems(build_wheel(ROOT), version), *image_problems(version, commit)]
        fit = f"changelog, manifests, wheel and image fit together; tag {commit}"
    if commit.endswith("-dirty"):
        problems.append("there are changes that are not committed")
    print("\n".join(problems) or f"{version}: {fit}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

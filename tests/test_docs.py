"""The documentation is built without a warning, leads nowhere that is not there, and names all that the code has."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from job.config import config_dir, keys
from job.errors import ExitCode
from job.metric_names import LOSS_TERMS, METRICS

ROOT = Path(__file__).parent.parent
WRITTEN = sorted((ROOT / "docs").rglob("*.md"))
# An indented line is a command to type; `job.train` is Hydra's, runtime.torchrun ends in one.
COMMANDS = [
    pytest.param(name, arguments, id=f"{page.stem}: {name} {arguments[:40]}")
    for page in WRITTEN
    for name, arguments in re.findall(
        r"^    python -m (?:job\.runtime\.torchrun .* -m )?job\.(\w+) (.*)$", page.read_text(), re.M
    )
]


class Links(HTMLParser):
    """What a page loads, where it links to, and the places in it that others link to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            elif name in ("src", "srcset") or (tag == "link" and name == "href"):
                self.loads.append(value or "")
            elif tag == "a" and name == "href":
                self.links.append(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does; a warning fails it."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason=f"needs {package}: pip install -r requirements-dev.lock")
    out = tmp_path_factory.mktemp("docs")
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--builder", "html", "-d", str(out / "read")]
    command = [sys.executable, "-m", "sphinx", *options, "docs", str(out / "html")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out / "html"


def test_the_reference_names_everything(site: Path) -> None:
    configuration = Links(site / "reference" / "configuration.html").places
    anchors = {name: name.replace(".", "-").replace("_", "-") for name in keys()}
    assert not [name for name, anchor in anchors.items() if anchor not in configuration]
    metrics = (site / "reference" / "metrics.html").read_text()
    assert not [name for name in METRICS if f">{name}<" not in metrics]
    assert not [term.key for term in LOSS_TERMS if f">{term.key}<" not in metrics]
    codes = (site / "reference" / "exit-codes.html").read_text()
    assert not [code for code in ExitCode if f">{int(code)}<" not in codes]
    python = Links(site / "reference" / "python.html").places
    assert {"job.api.load", "job.api.Model.encode", "job.api.Model.decode", "job.api.Model.round_trip"} <= python


def test_pages_ask_no_other_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not [load for load in Links(page).loads if re.match(r"(https?:)?//", load)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_links_lead_somewhere(site: Path) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html")}
    for page, found in pages.items():
        for link in found.links:
            target, _, place = link.partition("#")
            if re.match(r"\w+:", target):
                continue
            there = (page.parent / target).resolve() if target else page
            assert there.is_file(), f"{page.name}: {link}"
            assert not place or there.suffix != ".html" or place in pages[there].places, f"{page.name}: {link}"


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_a_command_of_the_pages_is_taken(name: str, arguments: str) -> None:
    words = shlex.split(arguments)
    if name != "train":
        importlib.import_module(f"job.{name}").parser().parse_args(words)
        return
    configuration = words[words.index("--config-name") + 1] if "--config-name" in words else "mmdit_cycle_vae"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        compose(configuration, [word for word in words if "=" in word])


def test_the_pages_have_commands() -> None:
    assert {"prepare", "train", "compare"} <= {str(parameter.values[0]) for parameter in COMMANDS}

"""The documentation is built without a warning, leads nowhere that is not there, and names all that the code has."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import PAGES, ROOT, Block, blocks_of, missing, run
from hydra import compose, initialize_config_dir
from tiny_run import tiny_run

import rules
from job.batch_sizes import batch_sizes
from job.config import TrainingConfig, config_dir, keys
from job.errors import ExitCode, UserError
from job.metric_names import LOSS_TERMS, METRICS


def typed(page: Path) -> str:
    """A page with its continued lines joined."""
    return re.sub(r"\\\n *", "", page.read_text())


# A command to type stands on an indented line or within a line of text; runtime.torchrun ends in one.
COMMANDS = [
    pytest.param(name, arguments, id=f"{page.stem}: {name} {arguments[:40]}")
    for page in PAGES
    for name, arguments in re.findall(
        r"(?:python -m |-m )job\.(?!runtime)([a-z]+)\b((?: +[^`#|()\s\"]+| +\"[^\"]*\")*)", typed(page)
    )
]
# Of the commands of launchers, from a page to the parser; what is behind them is for tests/slurm and tests/k8s.
LAUNCHERS = [
    pytest.param(name, arguments, id=f"{page.stem}: {name} {arguments[:40]}")
    for page in PAGES
    for name, arguments in re.findall(r"^    (?:\.venv/bin/)?cyclevae (slurm|k8s) (.*)", typed(page), re.M)
]
SEE_DOCS = re.compile(r"see docs: ?([a-z0-9/-]*)")


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
    alerts = (site / "reference" / "alerts.html").read_text()
    assert not [alert.name for alert in rules.alerts(rules.Durations(1)) if f">{alert.name}<" not in alerts]
    assert "\\" not in re.sub(r"<script.*?</script>|<pre.*?</pre>", "", alerts, flags=re.DOTALL)
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


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_a_page_begins_with_what_it_is_for(page: Path) -> None:
    """A sentence, where one asks whether to read on: neither a heading, a command, a table nor a list."""
    title, first, *_ = re.split(r"\n\n+", page.read_text().strip())
    assert re.fullmatch("# .*", title)
    assert not re.match(r" {4}|[#|`<!:$-]|\d+\. ", first) or re.match(r"`[^`]", first), first
    assert len(first.split()) >= 12, first


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_a_command_of_the_pages_is_taken(name: str, arguments: str) -> None:
    words = shlex.split(arguments.replace("...", ""))
    if "--help" in words:
        return
    if name != "train":
        _, overrides = importlib.import_module(f"job.{name}").parser().parse_known_args(words)
        assert all(name == "plan" and "=" in word for word in overrides)
        return
    configuration = words[words.index("--config-name") + 1] if "--config-name" in words else "mmdit_cycle_vae"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        overrides = [word for word in words if "=" in word and not word.startswith("hydra")]
        if "--multirun" in words:  # the first point of the sweep
            overrides = [re.sub(r"=([^\[,]*),.*", r"=\1", override) for override in overrides]
        compose(configuration, overrides)


@pytest.mark.parametrize(("name", "arguments"), LAUNCHERS)
def test_a_command_of_a_launcher_is_taken(name: str, arguments: str) -> None:
    words = shlex.split(arguments.replace("...", ""), comments=" # " in arguments)
    _, overrides = importlib.import_module(f"job.{name}").parser().parse_known_args(words)
    names = {"--config-name", "demo"}  # Hydra's own
    assert all("=" in word for word in overrides if word not in names)


def test_the_pages_have_commands() -> None:
    """All of them: a command that no page shows is one that nobody finds."""
    named = {str(parameter.values[0]) for parameter in COMMANDS}
    assert named >= {
        *("train", "prepare", "convert", "evaluate", "report", "sample", "encode", "decode"),
        *("benchmark", "compare", "doctor", "plan"),
    }
    assert {str(parameter.values[0]) for parameter in LAUNCHERS} == {"slurm", "k8s"}


# What is marked to run. The demo that some blocks need is a few steps of it: what is tested is that they run.


def in_order(long: bool) -> list[Any]:
    """The pages that have blocks for a suite; the long one runs the short ones, too, which are before them."""
    pages = {page: [block for block in blocks_of(page) if not block.suite] for page in PAGES}
    chosen = {page: [block for block in blocks if long or not block.long] for page, blocks in pages.items()}
    kept = {page: blocks for page, blocks in chosen.items() if any(block.long == long for block in blocks)}
    return [pytest.param(blocks, id=str(page.relative_to(ROOT))) for page, blocks in kept.items()]


def follow(blocks: Sequence[Block], directory: Path) -> None:
    """Run the blocks of a page, and compare what it shows."""
    for block in blocks:
        printed = run(block, directory)
        assert not missing(block.shown, printed), f"{block.page} shows what was not printed:\n{printed}"


@pytest.mark.parametrize("blocks", in_order(long=False))
def test_quick_blocks_run(blocks: list[Block], tmp_path: Path) -> None:
    follow(blocks, tmp_path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data/demo and runs/demo: the commands of `make train`, for a few names and steps."""
    directory = tmp_path_factory.mktemp("demo")
    lines = re.findall(r"\$\(BIN\)/(python -m job\.(?:prepare|train)(?:.*\\\n)*.*)\n", (ROOT / "Makefile").read_text())
    prepare, train = lines
    small = (
        "training.num_train_steps=12 training.warmup_steps=2 loss.cycle_text_warmup_steps=4 decoding.candidates=2 "
        "logging.num_eval_batches=1"
    )
    run(Block(ROOT / "Makefile", f"{prepare} --max-samples 3000", "bash"), directory)
    run(Block(ROOT / "Makefile", train, "bash", overrides=small), directory)
    return directory


@pytest.mark.docs
@pytest.mark.timeout(900)  # a page takes a minute or two, and a machine may have other work
@pytest.mark.parametrize("blocks", in_order(long=True))
def test_long_blocks_run(blocks: list[Block], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if any(block.needs_demo for block in blocks):
        shutil.copytree(request.getfixturevalue("demo"), tmp_path, dirs_exist_ok=True)
    follow(blocks, tmp_path)


def test_what_a_page_shows_is_compared() -> None:
    printed = "data/mine: 1000 training texts\n  loss 2.5"
    assert missing("data/mine: 1050 training texts", printed) == []
    assert missing("data/mine: 2000 training texts\n  loss 2.5", printed) == ["data/mine: 2000 training texts"]
    assert missing("data/mine: 1000 validation texts", printed) == ["data/mine: 1000 validation texts"]


# Refusals that end with the page which explains them.


def test_errors_point_to_pages_that_are_there() -> None:
    found = [
        (path, page) for path in sorted((ROOT / "job").rglob("*.py")) for page in SEE_DOCS.findall(path.read_text())
    ]
    wrong = [f"{path}: {page}" for path, page in found if page and not _is_page(page)]
    assert not wrong
    assert len(found) >= 12


def _is_page(name: str) -> bool:
    return (ROOT / "docs" / f"{name}.md").is_file()


def test_a_refusal_ends_with_its_page() -> None:
    with pytest.raises(UserError) as refused:
        batch_sizes(replace(TrainingConfig(), global_batch_size=9, train_batch_size=2), world_size=1)
    assert _is_page(SEE_DOCS.findall(str(refused.value))[0])
    assert str(refused.value).endswith(SEE_DOCS.findall(str(refused.value))[0])


@pytest.mark.parametrize("launcher", ["slurm", "k8s"])
def test_the_help_of_submit_names_its_page(launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(f"job.{launcher}").parser().parse_args(["submit", "--help"])
    assert _is_page(SEE_DOCS.findall(" ".join(capsys.readouterr().out.split()))[0])


# The README.


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 85


def test_the_example_of_the_readme_runs(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the directory that it is written for: a demo run is there, and no data."""
    found = re.search(r"^(    from job import load\n(?:(?:    .*)?\n)*)", (ROOT / "README.md").read_text(), re.M)
    assert found is not None
    tiny_run(tmp_path / "runs" / "demo", prepared)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(textwrap.dedent(found.group(1)), names)
    likely, given, trips = (ast.literal_eval(line) for line in capsys.readouterr().out.splitlines())
    assert names["latents"].shape == (2, 8)
    assert all(isinstance(text, str) for text in [*likely, *given])
    assert trips == names["model"].round_trip(names["texts"])

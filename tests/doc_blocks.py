"""Blocks of the documentation that are marked to run, and what is marked as their output.

    <!-- run -->                         the next block runs in the default suite
    <!-- run: long -->                   with `make test-docs` alone
    <!-- run: long, needs runs/demo -->  in a directory that has a small run, which stands for the one of `make train`
    <!-- run: long, KEY=VALUE ... -->    with these keys behind every `job.train`: a test has no time for all its steps
    <!-- run: slurm -->                  with `make test-slurm` alone, on its cluster; so k8s, and image
    <!-- prints -->                      the next block is what the one before printed, or a part of it

A block is indented by four columns or fenced. Of a page they run one after the other in one directory, as a reader
follows them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(
    r"^ *<!-- (?P<mark>run|prints)(?:: (?P<options>[^\n]*?))? -->\n\n"
    r"(?:```(?P<language>\w+)\n(?P<fenced>.*?)^```$|(?P<indented>(?:(?: {4}[^\n]*)?\n)+))",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
TOLERANCE = 0.1  # of numbers that a page shows: another release of Python has other names of characters
SUITES = ("slurm", "k8s", "image")
# For what a tutorial submits: the tests' clusters have no GPU and few cores, and a test has no time for a demo.
SMALLER = (
    "training.device=cpu training.num_train_steps=20 training.train_batch_size=4 training.warmup_steps=5 "
    "model.hidden_size=32 model.n_blocks=1 model.n_heads=2 model.head_dim=16 model.cond_dim=32 "
    "logging.num_samples=1 logging.num_eval_batches=1"
)
SMALLER_DEMO = "decoding.candidates=1 loss.cycle_text_warmup_steps=5 loss.cycle_latent_warmup_steps=5"


@dataclass
class Block:
    """A block that runs, with what the page shows of its output."""

    page: Path
    text: str
    language: str
    long: bool = False
    suite: str = ""  # of SUITES, which alone runs it
    needs_demo: bool = False
    overrides: str = ""
    shown: str = ""

    def script(self) -> str:
        """What bash runs."""
        if self.language == "python":
            return f"python - <<'END_OF_BLOCK'\n{self.text}\nEND_OF_BLOCK\n"
        lines = re.sub(r"\\\n *", "", self.text).splitlines()
        return "\n".join(f"{line} {self.overrides}" if " job.train" in line else line for line in lines)


def blocks_of(page: Path) -> list[Block]:
    """The marked blocks of a page, in their order."""
    blocks: list[Block] = []
    for found in MARK.finditer(page.read_text()):
        text = found["fenced"] if found["fenced"] is not None else re.sub(r"^ {4}", "", found["indented"], flags=re.M)
        if found["mark"] == "prints":
            blocks[-1].shown = text
            continue
        block = Block(page, text.strip("\n"), found["language"] or "bash")
        for option in filter(None, (found["options"] or "").split(", ")):
            if option == "long":
                block.long = True
            elif option in SUITES:
                block.suite = option
            elif option == "needs runs/demo":
                block.needs_demo = True
            else:
                assert re.fullmatch(r"\S+=\S+( \S+=\S+)*", option), f"{page}: unknown mark {option!r}"
                block.overrides = option
        blocks.append(block)
    return blocks


def run(block: Block, directory: Path, variables: Mapping[str, str] | None = None) -> str:
    """Run a block as a reader would, with this environment's programs; returns what it printed."""
    environment = {
        **os.environ,
        **(variables or {}),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", "-euo", "pipefail", "-c", block.script()]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.page}:\n{block.script()}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def smaller(block: Block, here: Mapping[str, str]) -> Block:
    """The block with what it submits made small, and with what stands `here` for what is printed there."""
    text = re.sub(r"\\\n *", "", block.text)
    for printed, other in here.items():
        text = text.replace(printed, other)
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"cyclevae \w+ submit ", line):
            lines[number] = f"{line} {SMALLER} {SMALLER_DEMO if '--config-name demo' in line else ''}"
    return replace(block, text="\n".join(lines))


def times_printed(blocks: Sequence[Block], words: str) -> int:
    """How often words stand in the commands of blocks: none, and a test replaces nothing."""
    return sum(re.sub(r"\\\n *", "", block.text).count(words) for block in blocks)


def missing(shown: str, printed: str) -> list[str]:
    """Lines that a page shows and that were not printed: other words, or numbers that differ by more than a tenth."""
    lines = printed.splitlines()
    return [line for line in shown.splitlines() if line.strip() and not any(_alike(line, other) for other in lines)]


def _alike(one: str, other: str) -> bool:
    if NUMBER.sub("0", one).split() != NUMBER.sub("0", other).split():
        return False
    numbers = zip(map(float, NUMBER.findall(one)), map(float, NUMBER.findall(other)), strict=True)
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) for a, b in numbers)

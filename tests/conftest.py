from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch: on a busy machine two threads wait for each other longer than tiny tensors take.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from job import prepare

# The same examples every time: a failure must come from a change. `pytest --hypothesis-profile=default` looks for new
# ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

SUBJECTS = [
    "The parser",
    "A client",
    "The server",
    "This module",
    "Every test",
    "The cache",
    "An iterator",
    "The compiler",
    "A thread",
    "The socket",
]
VERBS = ["returns", "reads", "closes", "checks", "copies", "prints", "sorts", "opens"]
OBJECTS = [
    "the first line",
    "a new file",
    "each value",
    "the whole message",
    "all the names",
    "an empty list",
    "the last record",
    "a long string of text",
]
OPTIONS = ["--vocab-size", "300", "--latent-dim", "8", "--validation-fraction", "0.2", "--shard-size", "100"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 different sentences, a line each, and one twice."""
    path = tmp_path_factory.mktemp("corpus") / "sentences.txt"
    lines = [" ".join(words) + "." for words in itertools.product(SUBJECTS, VERBS, OBJECTS)]
    path.write_text("\n".join([*lines, lines[0].upper()]) + "\n")
    return path


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of the corpus, in several shards."""
    out = tmp_path_factory.mktemp("prepared") / "dataset"
    assert prepare.main(["--out", str(out), "--source", str(corpus), *OPTIONS]) == 0
    return out

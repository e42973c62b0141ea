"""Tests that need a GPU (`make test-gpu`); without one they are skipped. The objective's cases are those of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "objective"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="PyTorch sees no GPU here"))


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """Products in whole float32, as on a CPU, and no compiled code of another test."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()

"""Real training runs on two ranks, harmed at seeded random moments (chaos.py), against a run left in peace."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import CYCLE, chaos


@pytest.mark.timeout(900)  # five starts of two ranks: under a minute on two idle cores, minutes on busy ones
def test_a_harmed_run_ends_like_one_left_in_peace(tmp_path: Path) -> None:
    chaos(tmp_path, CYCLE, seed=3, kinds=["one rank", "everything", "torchrun"])

"""Real training runs on two ranks, harmed at seeded random moments (chaos.py), against a run left in peace."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from chaos import CYCLE, TorchrunRun, chaos

from job.runtime.checkpoint import open_checkpoint, read_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # five starts of two ranks: under a minute on two idle cores, minutes on busy ones
]


def test_a_harmed_run_ends_like_one_left_in_peace(tmp_path: Path) -> None:
    chaos(tmp_path, CYCLE, seed=3, kinds=["one rank", "everything", "torchrun"])


def test_another_number_of_ranks_goes_on_with_the_same_samples_and_noise(tmp_path: Path) -> None:
    """Also when the ranks begin to hold shards of the model, or each begins to hold all of it."""
    overrides = [*CYCLE, "model.dropout=0", "training.gradient_accumulation_steps=1", "training.global_batch_size=8"]
    dice = random.Random(0)
    quiet = TorchrunRun(tmp_path / "quiet", overrides)
    quiet.finish()
    for world_size, strategy, stop_at in ((2, "fsdp", 4), (1, "ddp", 9)):
        moving = TorchrunRun(tmp_path / "moved", [*overrides, f"training.strategy={strategy}"], world_size)
        assert moving.interrupt("SIGUSR1 to torchrun", stop_at, 0.0, dice)
    moved = TorchrunRun(tmp_path / "moved", [*overrides, "training.strategy=fsdp"], world_size=4)
    moved.finish()
    expected, found = quiet.log(), moved.log()
    assert list(found) == list(expected)
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4, abs=1e-6), f"step {step}"
    weights, moved_weights = (read_weights(open_checkpoint(tmp_path / name), "model.") for name in ("quiet", "moved"))
    # FSDP takes no scalars: job.runtime.sharding averages their gradients itself.
    scalars = [name for name, weight in weights.items() if weight.dim() == 0]
    assert scalars
    assert [float(moved_weights[name]) for name in scalars] == pytest.approx(
        [float(weights[name]) for name in scalars], rel=1e-5
    )

"""The benchmark runs, its settings do the same work, and its count of operations is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.benchmark import exponent, main
from job.benchmarking.flops import step_flops
from job.benchmarking.measure import Shape
from job.config import Config

SMALL = ["--set", "model.hidden_size=32", "model.n_blocks=2", "model.cond_dim=32", "--batch", "2", "--seq-len", "16", "--vocab", "64", "--latent-dim", "8",
         "--repeats", "2", "--device", "cpu"]


def test_plain_and_fast_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--fill", "0.6", "--out", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    plain, fast = figures["model.implementation=plain"], figures["model.implementation=fast"]
    assert plain["first_loss"] == pytest.approx(fast["first_loss"], rel=1e-5)
    assert plain["speedup"] == 1
    assert fast["flops_per_step"] == plain["flops_per_step"] > 0
    assert sum(fast["parts"].values()) == pytest.approx(fast["step_seconds"], rel=1)
    assert fast["peak_memory_gib"] > 0
    assert "model.implementation=fast" in capsys.readouterr().out


def test_row_lengths_have_the_mean_asked_for() -> None:
    assert Shape(4, 100, 64, 8, 1.0).lengths() == [100] * 4
    lengths = Shape(8, 100, 64, 8, 0.6).lengths()
    assert sum(lengths) / 8 == pytest.approx(60, abs=1)
    assert min(lengths) < 40
    assert max(lengths) <= 100


def test_operations_of_the_text_head_and_of_the_cycle() -> None:
    config = Config()
    one, two = (step_flops(config, [7], vocab, 16) for vocab in (100, 200))
    assert two - one == 2 * 3 * 7 * 2 * config.model.hidden_size * 100  # two decoding passes, forward and twice that backward
    config.loss.cycle_text_weight = config.loss.cycle_latent_weight = 0.0
    assert step_flops(config, [7], 100, 16) == one / 2


def test_exponent() -> None:
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)

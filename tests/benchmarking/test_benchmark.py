"""The benchmark runs, its settings do the same work, and its count of operations is right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from job.benchmark import exponent, main, setting
from job.benchmarking.measure import Shape
from job.benchmarking.paper import count
from job.config import ModelConfig
from job.monitoring.flops import pass_flops

SMALL = [
    "--set",
    "model.hidden_size=32",
    "model.n_blocks=2",
    "model.cond_dim=32",
    "--batch",
    "2",
    "--seq-len",
    "16",
    "--vocab",
    "64",
    "--latent-dim",
    "8",
    "--repeats",
    "2",
    "--device",
    "cpu",
]


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


def test_exponent() -> None:
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_cost_along_the_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--grow", "ranks", "--values", "1", "2", "--compare", "model.implementation=fast"])
    assert "2 ranks: model.implementation=fast" in capsys.readouterr().out


def test_paper_counts_the_operations_that_a_step_needs() -> None:
    shape = Shape(2, 128, 2048, 16, 1.0)
    plain, fast = (
        count(
            setting(
                [
                    "model.hidden_size=64",
                    "model.n_blocks=2",
                    "model.cond_dim=64",
                    "model.num_residual_streams=1",
                    f"model.implementation={kind}",
                ],
                "",
                shape,
            ),
            shape,
        )
        for kind in ("plain", "fast")
    )
    needed = pass_flops(ModelConfig(hidden_size=64, n_blocks=2, cond_dim=64), np.array([128, 128]), 2048, 16)
    assert fast["flops"] == pytest.approx(2 * needed["t2l"] + 2 * needed["l2t"], rel=0.1)
    assert plain["flops"] > fast["flops"]
    assert plain["kernels"] > fast["kernels"]
    assert plain["peak_gib"] > fast["peak_gib"] > 0

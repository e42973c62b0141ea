"""The operations that a step is said to need are those that torch counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from job.config import Config, ModelConfig
from job.model.build import build_model
from job.monitoring.flops import Done, Work, pass_flops


@pytest.mark.parametrize("kind", ["t2l", "l2t"])
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    """By a difference of two depths, so that what the plain model computes in vain in its last block drops out."""
    rows, length = 3, 12

    def formula(blocks: int) -> float:
        return pass_flops(config(blocks), np.full(rows, length), 32, 8)[kind] / 3  # the forward third

    def config(blocks: int) -> ModelConfig:
        return ModelConfig(
            hidden_size=32,
            n_blocks=blocks,
            n_heads=3,
            head_dim=8,
            cond_dim=24,
            max_seq_len=length,
            num_residual_streams=1,
            qk_rmsnorm=False,
        )

    def counted(blocks: int) -> float:
        model, t = build_model(config(blocks), 32, 8, seed=0), torch.zeros(rows)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(
                torch.zeros(rows, length, dtype=torch.int64),
                torch.zeros(rows, 8),
                t,
                t,
                torch.ones(rows, length, dtype=torch.bool),
                heads=("text",) if kind == "l2t" else ("latent",),
            )
        return counter.get_total_flops()

    assert counted(4) - counted(2) == formula(4) - formula(2)


def test_the_trunk_of_the_cluster_model_costs_what_was_measured() -> None:
    """1.6 GFLOP per token, forward and backward, at 512 tokens; six operations per parameter would say 4.84."""
    model = ModelConfig(hidden_size=1024, n_blocks=24, n_heads=8, head_dim=64, cond_dim=1024)
    flops = pass_flops(model, np.array([512]), vocab_size=0, latent_dim=0)["joint"]
    assert flops / 512 == pytest.approx(1.6e9, rel=0.08)


def test_work_adds_up() -> None:
    work, model = Work(Config().model, 100, 8), Config().model
    work.add(np.array([3, 5]), {"t2l": 2, "l2t": 1})
    work.add(np.array([4]), {"joint": 1})
    two, one = pass_flops(model, np.array([3, 5]), 100, 8), pass_flops(model, np.array([4]), 100, 8)
    done = work.read()
    assert (done.tokens, done.samples) == (12, 3)
    assert done.flops == pytest.approx(2 * two["t2l"] + two["l2t"] + one["joint"])
    assert work.read() == Done()

"""Ramps, the latent's distance, and the draws of a step."""

from __future__ import annotations

import pytest
import torch

from job.objective.losses import latent_loss, ramp
from job.objective.noise import StepNoise, seed_for


def test_ramp() -> None:
    assert [ramp(step, 0.4, 10, 4) for step in (0, 9, 10, 11, 12, 14, 100)] == [0, 0, 0, 0.1, 0.2, 0.4, 0.4]
    assert [ramp(step, 0.4, 3, 0) for step in (2, 3)] == [0, 0.4]


def test_normalized_latent_loss_sees_the_direction_only() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert latent_loss(2 * x, x, normalize=True).item() == pytest.approx(0, abs=1e-12)
    assert latent_loss(2 * x, x, normalize=False).item() == pytest.approx(x.square().mean().item())


def test_draws_depend_on_name_seed_and_step_only() -> None:
    everyone = StepNoise(1, 2, torch.arange(6), 6)
    part = StepNoise(1, 2, torch.tensor([4, 1]), 6)
    assert torch.equal(everyone.normal("a", 3)[[4, 1]], part.normal("a", 3))
    assert torch.equal(everyone.uniform("a", 3)[[4, 1]], part.uniform("a", 3))
    others = [
        StepNoise(1, 3, torch.arange(6), 6).normal("a", 3),
        StepNoise(2, 2, torch.arange(6), 6).normal("a", 3),
        everyone.normal("b", 3),
    ]
    assert not any(torch.equal(everyone.normal("a", 3), other) for other in others)
    assert seed_for("a", 1) == seed_for("a", 1) < 2**63


def test_draws_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    StepNoise(1, 2, torch.arange(6), 6).normal("a", 3)
    assert torch.equal(state, torch.get_rng_state())

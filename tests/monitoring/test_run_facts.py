"""Weights of the terms as the configuration gives them: of the terms that a run trains, and of no others."""

from __future__ import annotations

import pytest

from job.config import LossConfig
from job.monitoring.run_facts import loss_weights

TARGET, APPLIED, RAMP_END = (f"cyclevae_loss_weight{suffix}" for suffix in ("_target", "", "_target_step"))


def test_growing_weights_have_a_target_and_the_step_of_their_ramps_end() -> None:
    config = LossConfig(
        loss_type="cycle_vae",
        latent_loss_weight=0.5,
        cycle_text_weight=0.1,
        cycle_text_warmup_steps=100,
        cycle_text_ramp_steps=50,
        cycle_latent_weight=0.2,
        cycle_latent_warmup_steps=10,
        cycle_latent_ramp_steps=20,
    )
    assert loss_weights(config) == {
        (TARGET, ("base_l2t_text",)): 1.0,
        (APPLIED, ("base_l2t_text",)): 1.0,
        (TARGET, ("base_t2l_latent",)): 0.5,
        (APPLIED, ("base_t2l_latent",)): 0.5,
        (TARGET, ("cycle_text",)): 0.1,
        (RAMP_END, ("cycle_text",)): 150,
        (TARGET, ("cycle_latent",)): 0.2,
        (RAMP_END, ("cycle_latent",)): 30,
    }


@pytest.mark.parametrize(
    ("loss_type", "terms"),
    [
        ("l2t", {"base_l2t_text": 1.0}),
        ("t2l", {"base_t2l_latent": 0.5}),
        ("unconditional", {"text": 1.0, "latent": 0.5}),
        ("random", {"base_l2t_text": 1.0, "base_t2l_latent": 0.5, "text": 1.0, "latent": 0.5}),
        ("sequential", {"base_l2t_text": 1.0, "base_t2l_latent": 0.5, "text": 1.0, "latent": 0.5}),
    ],
)
def test_single_directions_have_the_weights_of_their_own_terms(loss_type: str, terms: dict[str, float]) -> None:
    weights = loss_weights(LossConfig(loss_type=loss_type, latent_loss_weight=0.5))
    assert weights == {(name, (term,)): weight for name in (TARGET, APPLIED) for term, weight in terms.items()}

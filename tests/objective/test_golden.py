"""The objective's figures: the research code's (../shared/golden, where present), and ours on a model given by a
formula.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_cases import CASES, FIGURES, LGDLM, FixedNoise, case_configs, formula_batch, formula_objective, run

from job.config import Config, LossConfig, ModelConfig
from job.model.build import build_model
from job.objective.objective import Objective
from job.objective.schedule import LatentSchedule

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "cycle_vae_golden.pt"
needs_golden = pytest.mark.skipif(
    not GOLDEN.exists(), reason="the research code's figures (shared/golden) are not beside this checkout"
)


def close(found: float, expected: float, relative: bool = False) -> bool:
    return abs(found - expected) < 2e-5 * max(1.0, abs(expected) if relative else 1.0)


def assert_norms(found: Iterable[torch.Tensor], expected: Iterable[float]) -> None:
    for gradient, norm in zip(found, expected, strict=True):
        assert abs(float(gradient.norm()) - norm) <= 1e-4 * norm + 1e-6


@pytest.fixture(scope="module")
def golden() -> Any:
    return torch.load(GOLDEN, weights_only=True)


@needs_golden
@pytest.mark.parametrize("kind", ["plain", "fast"])
@pytest.mark.parametrize("case", CASES)
def test_research_code(golden: Any, case: str, kind: str) -> None:
    expected = golden["cases"][case]
    model_config = ModelConfig(
        implementation=kind,
        hidden_size=64,
        n_blocks=2,
        n_heads=8,
        head_dim=64,
        cond_dim=64,
        max_seq_len=12,
        qk_rmsnorm=False,
        time_scale=1.0,
        interpolate_schedule=False,
        latent_parameterization=expected["parameterization"],
        latent_beta_schedule=expected["beta_schedule"],
    )
    loss_config = LossConfig(
        latent_loss_weight=0.1,
        cycle_text_weight=0.3,
        cycle_latent_weight=0.2,
        latent_t_mode=expected["latent_t_mode"],
        cycle_stop_grad_latent=expected["cycle_stop_grad_latent"],
        **LGDLM,
    )
    model = build_model(model_config, golden["vocab_size"], 16, seed=0)
    model.load_state_dict(golden["state_dict"])
    names = ["latent_t", "latent_noise", "cycle_latent_t", "cycle_latent_noise"]
    if expected["latent_t_mode"] == "full":
        names = names[1::2]
    draws = {name: draw for name, (_, draw) in zip(names, expected["draws"], strict=True)}
    objective = Objective(model, Config(model=model_config, loss=loss_config), golden["mask_token_id"])
    metrics, gradients = run(objective, golden["batch"], FixedNoise(torch.arange(3), draws))
    for name in (
        "loss",
        "base_l2t_text_loss",
        "base_t2l_latent_loss",
        "cycle_text_loss",
        "cycle_latent_loss",
        "t_lat_mean",
        "latent_pred_norm",
    ):
        assert close(metrics[name], expected["metrics"][name], relative=case == "epsilon/full/stop/cosine"), name
    assert_norms(gradients.values(), [expected["grad_norm"][name] for name in gradients])


@needs_golden
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_research_code_schedules(golden: Any, schedule: str) -> None:
    ours = LatentSchedule(schedule=schedule, interpolate=False)
    tables = golden["schedules"][schedule]
    torch.testing.assert_close(ours.alpha_bar.sqrt(), tables["sqrt_alphas_cumprod"], rtol=2e-5, atol=1e-7)
    # its 1 - alpha_bar is the difference of two float32
    torch.testing.assert_close(
        ours.get_buffer("one_minus_alpha_bar").sqrt(), tables["sqrt_one_minus_alphas_cumprod"], rtol=2e-5, atol=1e-5
    )


@pytest.mark.parametrize("choices", ["lgdlm", "ours"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_formula(kind: str, case: str, choices: str) -> None:
    expected = json.loads(FIGURES.read_text())[f"{case}/{choices}"]
    model_config, loss_config = case_configs(case, choices == "lgdlm")
    objective = formula_objective(kind, model_config, loss_config)
    metrics, gradients = run(objective, formula_batch(), FixedNoise(torch.arange(3)))
    for name, value in expected["metrics"].items():
        assert close(metrics[name], value, relative=True), name
    assert_norms(gradients.values(), expected["grad_norm"])

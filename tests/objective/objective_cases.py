"""A small model, batch and draws given by a formula, and the figures of the objective on them.

`python tests/objective/objective_cases.py` writes tests/data/objective.json again, by the plain implementation; a
change of the figures is a change of the objective.
"""

from __future__ import annotations

import itertools
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from job.config import Config, LossConfig, ModelConfig, TrainingConfig
from job.model.build import build_model
from job.model.fast import FastMMDiT
from job.model.multimodal import MultimodalMMDiT
from job.objective.objective import Metrics, Objective
from job.runtime.precision import autocast

FIGURES = Path(__file__).parent.parent / "data" / "objective.json"
VOCAB, LATENT_DIM, MASK = 61, 8, 3
LGDLM: dict[str, Any] = {"ce_over_padding": True, "normalize_latent_loss": True}
CASES = (
    "epsilon/random/stop/cosine",
    "epsilon/full/stop/linear",
    "epsilon/full/stop/cosine",
    "x0/full/stop/cosine",
    "x0/random/nostop/cosine",
    "v_param/full/stop/cosine",
    "v_param/random/stop/cosine",
    "v_param/full/stop/sigmoid",
)


def formula(*shape: int, name: str = "") -> Tensor:
    """Numbers in [-1, 1] that look random and need no generator: the sine of the squared index, shifted by the name."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + zlib.crc32(name.encode()) % 997
    return (index * index * 0.6180339887).sin().float().reshape(shape)


def model_config(**changes: Any) -> ModelConfig:
    """A model small enough for a test of a few milliseconds."""
    return ModelConfig(
        **{"hidden_size": 32, "n_blocks": 2, "n_heads": 2, "head_dim": 16, "cond_dim": 32, "max_seq_len": 10, **changes}
    )


def formula_model(config: ModelConfig) -> MultimodalMMDiT:
    """A model whose weights are given by the formula, of a size that keeps activations near 1."""
    model = build_model(config, VOCAB, LATENT_DIM, seed=0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            draw = formula(*value.shape, name=name)
            value.copy_(0.5 + 0.3 * draw if value.dim() < 2 else 1.4 * draw / (value.numel() / value.shape[0]) ** 0.5)
    return model


def formula_objective(
    kind: str, model: ModelConfig, loss: LossConfig | None = None, training: TrainingConfig | None = None
) -> Objective:
    """The objective over a formula_model of an implementation, "plain" or "fast"."""
    config = Config(
        model=replace(model, implementation=kind), loss=loss or LossConfig(), training=training or TrainingConfig()
    )
    built = formula_model(config.model)
    if isinstance(built, FastMMDiT):
        built.compiled = config.training.compile_model
        built.checkpointing = config.training.activation_checkpointing
    return Objective(built, config, MASK)


def formula_batch(lengths: tuple[int, ...] = (10, 6, 3), seq_len: int = 10) -> dict[str, Tensor]:
    """Rows of the given lengths, padded with 0 to seq_len."""
    rows = len(lengths)
    mask = torch.arange(seq_len) < torch.tensor(lengths)[:, None]
    tokens = ((formula(rows, 10, name="tokens")[:, :seq_len] + 1) / 2 * (VOCAB - 4)).long() + 4
    tokens = nn.functional.pad(tokens, (0, seq_len - tokens.shape[1])) * mask
    return {"input_ids": tokens, "attention_mask": mask, "latent": formula(rows, LATENT_DIM, name="latent")}


class FixedNoise:
    """Draws from a table, or by the formula where it has none; stands in for StepNoise."""

    def __init__(self, position: Tensor, table: dict[str, Tensor] | None = None) -> None:
        self.position, self.table = position, table or {}

    def uniform_of_all(self, name: str, *shape: int) -> Tensor:
        return self.uniform(name, *shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        return self.table[name] if name in self.table else (formula(len(self.position), *shape, name=name) + 1) / 2

    def normal(self, name: str, *shape: int) -> Tensor:
        return self.table[name] if name in self.table else 1.4 * formula(len(self.position), *shape, name=name)


def case_configs(case: str, lgdlm: bool, **changes: Any) -> tuple[ModelConfig, LossConfig]:
    """Configurations of a case `parameterization/latent_t_mode/stop|nostop/beta_schedule`, as LGDLM or as we would."""
    parameterization, t_mode, stop, schedule = case.split("/")
    compat = {"qk_rmsnorm": False, "time_scale": 1.0, "interpolate_schedule": False} if lgdlm else {}
    model = model_config(
        latent_parameterization=parameterization, latent_beta_schedule=schedule, **{**compat, **changes}
    )
    loss = LossConfig(
        latent_loss_weight=0.1,
        cycle_text_weight=0.3,
        cycle_latent_weight=0.2,
        latent_t_mode=t_mode,
        cycle_stop_grad_latent=stop == "stop",
        **(LGDLM if lgdlm else {}),
    )
    return model, loss


def run(
    objective: Objective, batch: dict[str, Tensor], noise: Any = None, step: int = 0, dtype: str = "fp32"
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of one step in one stage; zeros for parameters without a gradient."""
    objective.zero_grad()
    with autocast(dtype, torch.device("cpu")):
        loss, metrics, _ = objective(batch, step, noise=noise)
    loss.backward()
    return numbers(metrics), gradients_of(objective)


def numbers(metrics: Metrics) -> dict[str, float]:
    """Metrics as plain numbers."""
    return {key: float(torch.as_tensor(value).detach()) for key, value in metrics.items()}


def gradients_of(objective: Objective) -> dict[str, Tensor]:
    """Copies of the model's gradients; zeros where there is none."""
    named = objective.model.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def figures() -> dict[str, Any]:
    """Losses and gradient norms (in the order of named_parameters) of every case."""
    result: dict[str, Any] = {}
    for case, lgdlm in itertools.product(CASES, (True, False)):
        model, loss = case_configs(case, lgdlm)
        objective = formula_objective("plain", model, loss)
        metrics, gradients = run(objective, formula_batch(), FixedNoise(torch.arange(3)))
        result[f"{case}/{'lgdlm' if lgdlm else 'ours'}"] = {
            "metrics": metrics,
            "grad_norm": [float(f"{g.norm():.7g}") for g in gradients.values()],
        }
    return result


if __name__ == "__main__":
    FIGURES.write_text(json.dumps(figures()).replace('}, "', '},\n"') + "\n")

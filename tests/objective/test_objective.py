"""What a step may depend on: not the number of ranks, not the padding; and what it must not compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from objective_cases import formula_batch, formula_objective, model_config, run
from torch import Tensor

from job.config import LossConfig, ModeSteps, TrainingConfig
from job.model.plain import pseudo_tokens
from job.objective.objective import Objective

LENGTHS = (10, 6, 3, 1, 9, 4, 7, 2)
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cycle_vae": ({"latent_t_mode": "random"}, {}),
    "categorical": ({"cycle_latent_sampling": "categorical"}, {}),
    "nostop": ({"cycle_stop_grad_latent": False}, {}),
    "over_padding": ({"ce_over_padding": True}, {}),
    "l2t": ({"loss_type": "l2t"}, {}),
    "t2l": ({"loss_type": "t2l", "latent_t_mode": "random"}, {}),
    "unconditional": ({"loss_type": "unconditional"}, {}),
    "random": ({"loss_type": "random"}, {}),
    "sequential": (
        {"loss_type": "sequential"},
        {"sequential_schedule": [ModeSteps("unconditional", 2), ModeSteps("t2l", 1)]},
    ),
}


def make(
    loss: dict[str, Any] | None = None, training: dict[str, Any] | None = None, kind: str = "plain", **model: Any
) -> Objective:
    return formula_objective(
        kind, model_config(**model), LossConfig(**(loss or {})), TrainingConfig(**(training or {}))
    )


def rank_of(batch: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """The rows of one rank of a global batch, dealt out as the sampler may: every world-th row."""
    position = torch.arange(rank, len(batch["latent"]), world)
    return {
        "position": position,
        "global_lengths": batch["attention_mask"].sum(1),
        **{key: value[position] for key, value in batch.items()},
    }


def mean(values: list[Any]) -> Any:
    return sum(values) / len(values)


@pytest.mark.parametrize(("kind", "step"), [("plain", 3), ("plain", 5), ("fast", 3)])
@pytest.mark.parametrize("mode", MODES)
def test_the_number_of_ranks_changes_nothing(mode: str, kind: str, step: int) -> None:
    objective = make(*MODES[mode], kind=kind)
    batch = formula_batch(LENGTHS)
    whole_metrics, whole = run(objective, rank_of(batch, 0, 1), step=step)
    for world in (2, 4):
        parts = [run(objective, rank_of(batch, rank, world), step=step) for rank in range(world)]
        for name, value in whole_metrics.items():
            assert mean([metrics[name] for metrics, _ in parts]) == pytest.approx(value, rel=2e-5), name
        for name, gradient in whole.items():
            torch.testing.assert_close(
                mean([gradients[name] for _, gradients in parts]), gradient, rtol=1e-3, atol=1e-6
            )


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "over_padding"])
def test_padding_changes_nothing(mode: str) -> None:
    objective = make(*MODES[mode])
    short, gradients = run(objective, formula_batch((6, 3, 5), seq_len=6), step=3)
    long, more_gradients = run(objective, formula_batch((6, 3, 5), seq_len=9), step=3)
    assert long == pytest.approx(short, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(more_gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_content_of_padding_changes_nothing() -> None:
    objective, batch = make(), formula_batch()
    other = {**batch, "input_ids": torch.where(batch["attention_mask"], batch["input_ids"], 7)}
    assert run(objective, other)[0] == pytest.approx(run(objective, batch)[0], rel=1e-6)


def test_modes_follow_their_schedule_and_weights() -> None:
    sequential = make(*MODES["sequential"])
    assert [sequential.plan.mode(step) for step in range(4)] == [
        "unconditional",
        "unconditional",
        "t2l",
        "unconditional",
    ]
    objective = make({"loss_type": "random"}, {"mode_weights": [0.0, 1.0, 3.0]})
    drawn = [objective.plan.mode(step) for step in range(400)]
    assert "unconditional" not in drawn
    assert 60 < drawn.count("l2t") < 140


def rows_through_the_model(objective: Objective, loss: Callable[[], Any]) -> int:
    """Rows that enter the latent encoder, which every pass of every row needs."""
    rows = []
    hook = objective.get_submodule("model.latent_encoder").register_forward_hook(
        lambda module, args, output: rows.append(len(args[0]))
    )
    loss()
    hook.remove()
    return sum(rows)


@pytest.mark.parametrize(("text", "latent", "passes"), [(0.3, 0.2, 4), (0.3, 0.0, 3), (0.0, 0.2, 3), (0.0, 0.0, 2)])
def test_a_term_of_weight_zero_is_not_computed(text: float, latent: float, passes: int) -> None:
    objective, batch = make({"cycle_text_weight": text, "cycle_latent_weight": latent}), formula_batch()
    assert rows_through_the_model(objective, lambda: objective(batch, 0)) == 3 * passes
    _, metrics, _ = objective(batch, 0)
    assert ("cycle_text_loss" in metrics, "cycle_latent_loss" in metrics) == (text > 0, latent > 0)


def test_a_term_in_warm_up_is_not_computed() -> None:
    objective, batch = make({"cycle_text_warmup_steps": 5, "cycle_latent_warmup_steps": 6}), formula_batch()
    assert [rows_through_the_model(objective, partial(objective, batch, step)) for step in (4, 5, 6)] == [6, 9, 12]


@pytest.mark.parametrize("stop", [True, False])
def test_stop_grad_cuts_cycle_text_from_the_predicted_latent(stop: bool) -> None:
    # only a T2L pass uses the latent head; of these, only cycle_text's loss is left here
    objective = make(
        {
            "cycle_stop_grad_latent": stop,
            "latent_loss_weight": 0.0,
            "cycle_text_weight": 1.0,
            "cycle_latent_weight": 0.0,
        }
    )
    _, gradients = run(objective, formula_batch())
    assert (gradients["latent_head.3.weight"].abs().max().item() == 0) == stop


def test_categorical_pseudo_tokens_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    uniform = torch.rand(1, 4000, generator=torch.Generator().manual_seed(0))
    drawn = pseudo_tokens(probabilities.log().expand(1, 4000, 3), uniform)
    torch.testing.assert_close(drawn.flatten().bincount() / 4000, probabilities, rtol=0, atol=0.03)


def test_latents_with_a_middle_axis_are_taken() -> None:
    objective, batch = make(), formula_batch()
    assert run(objective, {**batch, "latent": batch["latent"][:, None]})[0] == run(objective, batch)[0]


def test_dropout_takes_effect_in_training_only() -> None:
    objective, batch = make(dropout=0.5), formula_batch()
    assert run(objective, batch)[0]["loss"] != run(objective, batch)[0]["loss"]
    objective.eval()
    assert run(objective, batch)[0] == run(objective, batch)[0]

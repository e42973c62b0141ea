"""Rows that lack a half: what they train, what they cost, and that they change nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from objective_cases import MASK, formula_batch, formula_objective, gradients_of, model_config, numbers, run
from torch import Tensor

from job.config import LossConfig
from job.objective.objective import Objective
from job.row_kinds import LATENT, PAIRED, TEXT, RowKinds

LENGTHS = (10, 6, 3, 1, 9, 4, 7, 2)
KINDS = torch.tensor([PAIRED, TEXT, LATENT, TEXT, PAIRED, LATENT, TEXT, PAIRED])
LOSSES: dict[str, dict[str, Any]] = {
    "default": {},
    "nostop": {"cycle_stop_grad_latent": False},
    "random times": {"latent_t_mode": "random"},
    "random masks": {"text_t_mode": "random"},
    "cycle_text on unpaired": {"cycle_text_on": "unpaired"},
}


def make(kind: str = "fast", **loss: Any) -> Objective:
    return formula_objective(kind, model_config(), LossConfig(**{"cycle_text_weight": 0.5, **loss}))


def of_kinds(kinds: Tensor = KINDS) -> dict[str, Tensor]:
    """A global batch in which the latents that rows do not have are no numbers, and texts are the mask token alone."""
    batch = formula_batch(LENGTHS)
    batch["latent"][kinds == TEXT] = torch.nan
    batch["input_ids"][kinds == LATENT] = MASK
    return batch


def micro_batch(batch: dict[str, Tensor], kinds: Tensor, position: Tensor) -> dict[str, Any]:
    """Rows of a global batch, as the loader gives them: in the order of their kinds."""
    position = position[kinds[position].argsort(stable=True)]

    def counts(of: Tensor) -> Any:
        return tuple(torch.bincount(of, minlength=3).tolist())

    return {
        "position": position,
        "global_lengths": batch["attention_mask"].sum(1),
        "global_kinds": kinds,
        "row_kinds": RowKinds(counts(kinds[position]), counts(kinds)),
        **{name: values[position] for name, values in batch.items()},
    }


def whole(kinds: Tensor = KINDS) -> dict[str, Any]:
    return micro_batch(of_kinds(kinds), kinds, torch.arange(len(kinds)))


@pytest.mark.parametrize("kind", ["plain", "fast"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_division_into_micro_batches_changes_nothing(loss: str, kind: str) -> None:
    objective = make(kind, **LOSSES[loss])
    expected, expected_gradients = run(objective, whole(), step=3)
    assert all(torch.tensor(list(expected.values())).isfinite())
    uneven = [torch.tensor([0, 1, 2, 6]), torch.tensor([3, 4, 5, 7])]
    parts = [run(objective, micro_batch(of_kinds(), KINDS, position), step=3) for position in uneven]
    for name, value in expected.items():
        assert sum(metrics[name] for metrics, _ in parts) / 2 == pytest.approx(value, rel=2e-5), name
    for name, gradient in expected_gradients.items():
        halves = [gradients[name] for _, gradients in parts]
        torch.testing.assert_close((halves[0] + halves[1]) / 2, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "nostop"])
def test_two_stages_add_up_to_one(loss: str) -> None:
    objective = make(**LOSSES[loss])
    expected, expected_gradients = run(objective, whole(), step=3)
    objective.zero_grad()
    base = None
    for stage in ("base", "cycle"):
        part, metrics, base = objective(whole(), 3, stage, base)
        part.backward()
    assert numbers(metrics) == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients_of(objective).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["plain", "fast"])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_that_have_both_halves_are_trained_as_ever(loss: str, kind: str) -> None:
    if loss == "cycle_text on unpaired":
        pytest.skip("there is none")
    objective, all_paired = make(kind, **LOSSES[loss]), torch.zeros(8, dtype=torch.int64)
    expected, expected_gradients = run(objective, formula_batch(LENGTHS), step=3)
    metrics, gradients = run(objective, whole(all_paired), step=3)
    assert metrics == pytest.approx(expected, rel=1e-6)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("weights", "kinds", "terms"),
    [
        # (cycle_text, cycle_latent), rows, and by hand: passes of the three paired, the three texts, the two latents
        ((0.5, 0.0), KINDS, 3 * 3 + 3 * 2 + 0),
        ((0.0, 0.5), KINDS, 3 * 3 + 0 + 2 * 2),
        ((0.5, 0.5), KINDS, 3 * 4 + 3 * 2 + 2 * 2),
    ],
)
def test_a_row_costs_the_passes_that_it_has_a_term_for(weights: tuple[float, float], kinds: Tensor, terms: int) -> None:
    objective = make(cycle_text_weight=weights[0], cycle_latent_weight=weights[1])
    rows: list[int] = []
    objective.get_submodule("model.latent_encoder").register_forward_hook(
        lambda _, given, __: rows.append(len(given[0]))
    )
    objective(whole(kinds), 0)
    assert sum(rows) == terms


def test_a_text_alone_trains_the_decoder_through_the_latent_that_is_predicted_from_it() -> None:
    """Its gradient is that of decoding it from that latent, taken as if it were its own."""
    kinds = torch.tensor([PAIRED] + [TEXT] * 7)
    objective = make(cycle_text_weight=1.0, cycle_latent_weight=0.0, cycle_text_on="unpaired")
    alone = make(loss_type="l2t")
    batch = whole(kinds)
    _, _, base = objective(batch, 0, "base")
    assert base is not None
    own = formula_batch(LENGTHS)
    expected, expected_gradients = run(
        alone, {name: values[1:] for name, values in own.items()} | {"latent": base.x0[TEXT]}
    )
    objective.zero_grad()
    loss, metrics, _ = objective(batch, 0, "cycle", base)
    loss.backward()
    assert numbers(metrics)["cycle_text_loss"] == pytest.approx(expected["base_l2t_text_loss"], rel=1e-5)
    for name, gradient in gradients_of(objective).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6)


def test_a_latent_alone_is_a_target_that_its_own_decoding_must_lead_back_to() -> None:
    kinds = torch.tensor([PAIRED] + [LATENT] * 7)
    objective = make(cycle_text_weight=0.0, cycle_latent_weight=1.0)
    _, metrics, _ = objective(whole(kinds), 0)
    _, _, base = objective(whole(kinds), 0, "base")
    assert base is not None
    assert base.tokens[LATENT].shape == (7, 10)
    other = whole(kinds)
    other["latent"] = other["latent"].clone()
    other["latent"][3] += 1
    assert objective(other, 0)[1]["cycle_latent_loss"] != metrics["cycle_latent_loss"]
    assert objective(other, 0)[1]["base_t2l_latent_loss"] == metrics["base_t2l_latent_loss"]

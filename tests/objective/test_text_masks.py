"""Partly masked texts: what is masked, what counts, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objective_cases import MASK, formula_batch, formula_objective, gradients_of, model_config, numbers, run

from job.config import LossConfig
from job.model.groups import Group
from job.objective.inputs import Inputs
from job.objective.text_masks import mask_text
from job.row_kinds import PAIRED

LENGTHS = (10, 6, 3, 8, 1, 9)


def inputs(rows: int = 400) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 11, (rows,), generator=generator)
    mask = torch.arange(10) < lengths[:, None]
    tokens = torch.randint(4, 60, (rows, 10), generator=generator) * mask
    return Inputs.of({"input_ids": tokens, "attention_mask": mask, "latent": torch.zeros(rows, 8)}, 7, 3)


def masked(loss: LossConfig, s: Inputs, name: str = "base_text") -> Any:
    return mask_text(s, loss, MASK, 10, name)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_rows_are_masked_at_their_ratio_and_a_share_of_them_fully(share: float) -> None:
    s = inputs()
    text = masked(LossConfig(text_t_mode="random", text_full_share=share), s)
    assert torch.equal(text.tokens == MASK, text.counted)
    assert torch.equal(text.tokens[~text.counted], s.tokens[~text.counted])
    assert not (text.counted & ~s.mask).any()
    is_full = text.t == 1
    assert is_full.double().mean().item() == pytest.approx(share, abs=0.08)
    assert torch.equal(text.counted[is_full], s.mask[is_full])
    assert text.t[~is_full].mean().item() == pytest.approx(0.5, abs=0.05)
    found, expected = text.counted.sum().item(), (text.t * s.mask.sum(1)).sum().item()
    assert found == pytest.approx(expected, rel=0.05)
    assert text.denominator == found


def test_base_and_cycle_are_masked_differently_and_a_step_always_alike() -> None:
    loss, s = LossConfig(text_t_mode="random"), inputs()
    assert torch.equal(masked(loss, s).tokens, masked(loss, inputs()).tokens)
    assert not torch.equal(masked(loss, s).tokens, masked(loss, s, "cycle_text").tokens)


@pytest.mark.parametrize("kind", ["plain", "fast"])
@pytest.mark.parametrize("loss_type", ["cycle_vae", "l2t"])
def test_share_one_is_full_to_the_bit(kind: str, loss_type: str) -> None:
    batch = formula_batch(LENGTHS)
    full = run(formula_objective(kind, model_config(), LossConfig(loss_type=loss_type)), batch)
    loss = LossConfig(loss_type=loss_type, text_t_mode="random", text_full_share=1.0)
    random = run(formula_objective(kind, model_config(), loss), batch)
    assert random[0] == full[0]
    assert all(torch.equal(random[1][name], gradient) for name, gradient in full[1].items())


@pytest.mark.parametrize("weighting", ["mean", "elbo"])
def test_the_loss_is_the_weighted_cross_entropy_of_the_masked_tokens(weighting: str) -> None:
    batch = formula_batch(LENGTHS)
    loss = LossConfig(loss_type="l2t", text_t_mode="random", text_weighting=weighting)
    objective = formula_objective("plain", model_config(), loss)
    s = Inputs.of(batch, objective.training_config.seed, 0)
    text = objective.masked_text(s, "base_text")
    group = Group(text.tokens, s.latent, text.t, torch.zeros(1), ("text",))
    logits = objective.model.encode([group], s.padding).text
    losses = F.cross_entropy(logits.transpose(1, 2), s.tokens, reduction="none")
    if weighting == "mean":
        expected = losses[text.counted].mean()
    else:
        expected = (losses / text.t[:, None])[text.counted].sum() / s.mask.sum()
    assert run(objective, batch)[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "elbo": {"text_weighting": "elbo"},
    "no full rows": {"text_full_share": 0.0},
    "categorical": {"cycle_latent_sampling": "categorical", "latent_t_mode": "random"},
    "nostop": {"cycle_stop_grad_latent": False},
    "l2t": {"loss_type": "l2t", "text_weighting": "elbo"},
}


@pytest.mark.parametrize("case", CASES)
def test_fast_is_plain(case: str) -> None:
    batch, loss = formula_batch(LENGTHS), LossConfig(text_t_mode="random", **CASES[case])
    expected, expected_gradients = run(formula_objective("plain", model_config(), loss), batch, step=2)
    found, gradients = run(formula_objective("fast", model_config(), loss), batch, step=2)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name, gradient in gradients.items():
        norm = expected_gradients[name].norm()
        assert (gradient - expected_gradients[name]).norm() <= 1e-4 * norm + 1e-6, name


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_ranks_changes_nothing(case: str) -> None:
    objective = formula_objective("fast", model_config(), LossConfig(text_t_mode="random", **CASES[case]))
    batch = formula_batch(LENGTHS)
    lengths = batch["attention_mask"].sum(1)
    whole, whole_gradients = run(objective, batch, step=2)
    parts = []
    for rank in range(3):
        position = torch.arange(rank, len(LENGTHS), 3)
        rows = {name: value[position] for name, value in batch.items()}
        parts.append(run(objective, {"position": position, "global_lengths": lengths, **rows}, step=2))
    for name, value in whole.items():
        assert sum(metrics[name] for metrics, _ in parts) / 3 == pytest.approx(value, rel=2e-5), name
    for name, gradient in whole_gradients.items():
        mean = sum(gradients[name] for _, gradients in parts) / 3
        torch.testing.assert_close(mean, gradient, rtol=1e-3, atol=1e-6)


def test_stages_add_up_to_one() -> None:
    batch = formula_batch(LENGTHS)
    objective = formula_objective("fast", model_config(), LossConfig(text_t_mode="random"))
    expected, expected_gradients = run(objective, batch)
    objective.zero_grad()
    base, metrics = None, {}
    for stage in objective.stages(0):
        loss, metrics, base = objective(batch, 0, stage, base)
        loss.backward()
    assert numbers(metrics) == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients_of(objective).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-7)


def test_the_cycle_starts_from_what_the_latent_alone_decodes_to() -> None:
    # The same pseudo-tokens as with fully masked texts, though the base term shows the decoder a part of the text.
    batch = formula_batch(LENGTHS)
    tokens = []
    for mode in ("full", "random"):
        objective = formula_objective("fast", model_config(), LossConfig(text_t_mode=mode))
        _, _, base = objective(batch, 0, "base")
        assert base is not None
        tokens.append(base.tokens[PAIRED])
    assert torch.equal(tokens[0], tokens[1])

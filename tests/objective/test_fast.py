"""The fast path is the plain path: losses, gradients and pseudo-tokens."""

from __future__ import annotations

from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import MASK, formula_batch, formula_model, model_config, run
from torch._dynamo.utils import counters

from job.config import LossConfig, TrainingConfig
from job.model import fast, packed
from job.objective.fast import FastTrainer
from job.objective.trainer import Trainer


def assert_same(batch: dict[str, torch.Tensor], loss: dict[str, Any], step: int = 0, **model: Any) -> None:
    config, loss_config = model_config(**model), LossConfig(**loss)
    weights = formula_model(config)
    expected, expected_gradients = run(Trainer(weights, config, loss_config, TrainingConfig(), MASK), batch, step=step)
    found, gradients = run(FastTrainer(weights, config, loss_config, TrainingConfig(), MASK), batch, step=step)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name, gradient in gradients.items():
        norm = expected_gradients[name].norm()
        assert (gradient - expected_gradients[name]).norm() <= 1e-4 * norm + 1e-6, f"{name}: {norm}"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=4),
    padded=st.booleans(),
    streams=st.sampled_from([1, 2, 4]),
    parameterization=st.sampled_from(["x0", "v_param", "epsilon"]),
    t_mode=st.sampled_from(["full", "random"]),
    qk_rmsnorm=st.booleans(),
    sampling=st.sampled_from(["argmax", "categorical"]),
    over_padding=st.booleans(),
    normalize=st.booleans(),
    stop=st.booleans(),
    text_weight=st.sampled_from([0.0, 0.3]),
    latent_weight=st.sampled_from([0.0, 0.2]),
    short=st.sampled_from([0, 64]),
    by_index=st.booleans(),
    loss_type=st.sampled_from(["cycle_vae", "l2t", "t2l", "unconditional"]),
)
def test_fast_is_plain(
    lengths: list[int],
    padded: bool,
    streams: int,
    parameterization: str,
    t_mode: str,
    qk_rmsnorm: bool,
    sampling: str,
    over_padding: bool,
    normalize: bool,
    stop: bool,
    text_weight: float,
    latent_weight: float,
    short: int,
    by_index: bool,
    loss_type: str,
) -> None:
    batch = formula_batch(tuple(lengths), max(lengths) if not padded else 10)
    loss = {
        "loss_type": loss_type,
        "latent_t_mode": t_mode,
        "cycle_latent_t_max": 0.9,
        "cycle_latent_sampling": sampling,
        "ce_over_padding": over_padding,
        "normalize_latent_loss": normalize,
        "cycle_stop_grad_latent": stop,
        "cycle_text_weight": text_weight,
        "cycle_latent_weight": latent_weight,
    }
    if parameterization == "epsilon" and t_mode == "full":
        loss["latent_t_mode"] = "random"  # x0 is divided by 1.6e-5 there, and rounding with it
    # rows attend one by one or side by side, conditions are looked up or taken span by span
    with mock.patch.object(packed, "SHORT", short), mock.patch.object(packed.Spans, "by_index", by_index):
        assert_same(
            batch, loss, num_residual_streams=streams, latent_parameterization=parameterization, qk_rmsnorm=qk_rmsnorm
        )


@pytest.mark.parametrize("t_mode", ["full", "random"])
def test_two_stages_add_up_to_one(t_mode: str) -> None:
    config, batch = model_config(), formula_batch()
    trainer = FastTrainer(formula_model(config), config, LossConfig(latent_t_mode=t_mode), TrainingConfig(), MASK)
    expected, expected_gradients = run(trainer, batch)
    trainer.zero_grad()
    assert trainer.stages(0) == 2
    for stage in range(2):
        loss, metrics = trainer(batch, 0, None, stage)
        loss.backward()
    assert {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()} == pytest.approx(
        expected, rel=1e-6
    )
    for name, p in trainer.model.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-7)


@pytest.mark.timeout(300)
def test_compiled_blocks_are_whole_graphs_that_serve_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the code generator, which takes minutes: one graph for each kind of half a block, for any number of blocks and any lengths."""
    monkeypatch.setattr(fast, "_compiled", cache(partial(torch.compile, backend="eager", dynamic=True, fullgraph=True)))
    torch._dynamo.reset()
    counters.clear()
    config = model_config(n_blocks=3)
    plain = Trainer(formula_model(config), config, LossConfig(), TrainingConfig(), MASK)
    compiled = FastTrainer(formula_model(config), config, LossConfig(), TrainingConfig(compile_model=True), MASK)
    for lengths in ((5, 3), (2, 9), (7, 8), (4, 10)):
        expected, _ = run(plain, formula_batch(lengths, max(lengths)))
        found, _ = run(compiled, formula_batch(lengths, max(lengths)))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert counters["stats"]["unique_graphs"] <= 6


def test_stages_touch_the_same_parameters() -> None:
    # otherwise DDP would wait in the second stage for gradients that were made in the first
    config, batch = model_config(), formula_batch()
    trainer = FastTrainer(formula_model(config), config, LossConfig(), TrainingConfig(), MASK)
    touched = []
    for stage in range(2):
        trainer.zero_grad()
        trainer(batch, 0, None, stage)[0].backward()
        touched.append({name for name, p in trainer.named_parameters() if p.grad is not None})
    assert touched[0] == touched[1]


@pytest.mark.parametrize(
    ("loss", "stages"),
    [
        ({}, 2),
        ({"cycle_stop_grad_latent": False}, 1),
        ({"cycle_text_weight": 0.0}, 1),
        ({"loss_type": "l2t"}, 1),
        ({"cycle_latent_warmup_steps": 3}, 1),
    ],
)
def test_number_of_stages(loss: dict[str, Any], stages: int) -> None:
    config = model_config()
    assert FastTrainer(formula_model(config), config, LossConfig(**loss), TrainingConfig(), MASK).stages(0) == stages


@pytest.mark.parametrize(("text", "latent", "passes"), [(0.3, 0.2, 2), (0.3, 0.0, 2), (0.0, 0.2, 2), (0.0, 0.0, 1)])
def test_passes_are_paired_and_terms_of_weight_zero_left_out(text: float, latent: float, passes: int) -> None:
    config, batch = model_config(), formula_batch()
    trainer = FastTrainer(
        formula_model(config),
        config,
        LossConfig(cycle_text_weight=text, cycle_latent_weight=latent),
        TrainingConfig(),
        MASK,
    )
    calls: list[int] = []
    trainer.get_submodule("model.latent_encoder").register_forward_hook(
        lambda module, args, output: calls.append(len(args[0]))
    )
    trainer(batch, 0)
    assert len(calls) == passes
    assert sum(calls) == 3 * (2 + (text > 0) + (latent > 0))


def test_checkpointing_changes_no_number() -> None:
    config, batch = model_config(dropout=0.3), formula_batch()
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        training = TrainingConfig(activation_checkpointing=checkpointing)
        results.append(run(FastTrainer(formula_model(config), config, LossConfig(), training, MASK), batch))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient)


def test_bf16_autocast_stays_near_float32() -> None:
    config, batch = model_config(), formula_batch()
    trainer = FastTrainer(formula_model(config), config, LossConfig(), TrainingConfig(), MASK)
    expected, _ = run(trainer, batch)
    found, gradients = run(trainer, batch, dtype="bf16")
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients.values())

"""The objective on a GPU gives the figures that it gives on a CPU, and never makes the host wait."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from objective_cases import (
    CASES,
    FIGURES,
    FixedNoise,
    case_configs,
    formula_batch,
    formula_objective,
    gradients_of,
    model_config,
    numbers,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from job.config import Config, LossConfig, TrainingConfig
from job.model.attention import cudnn_serves
from job.model.fast import FastMMDiT
from job.model.flash4 import flash4_serves
from job.objective.objective import Objective
from job.runtime.optimizer import Optimizer
from job.runtime.precision import FP8_CAPABILITY, autocast, backward_pass, set_up

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
CUDA = torch.device("cuda")
LONG = {"max_seq_len": 96, "head_dim": 32}
RAGGED = (96, 40, 71, 3)
KINDS = ("to_cond", "to_post_branch_gammas", "residual_fns", "joint_attn", "feedforwards", "conditioning", "_head")


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """Products in whole float32, as on a CPU, and no compiled code of another test."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


class NoiseOnGpu(FixedNoise):
    def uniform(self, name: str, *shape: int) -> Tensor:
        return super().uniform(name, *shape).to(CUDA)

    def normal(self, name: str, *shape: int) -> Tensor:
        return super().normal(name, *shape).to(CUDA)


def on_gpu(batch: dict[str, Tensor]) -> dict[str, Any]:
    """A batch as the loop gives it: with its row lengths, which the host knows."""
    return {name: x.to(CUDA) for name, x in batch.items()} | {"row_lengths": batch["attention_mask"].sum(1).tolist()}


def model_of(objective: Objective) -> FastMMDiT:
    model = objective.model
    assert isinstance(model, FastMMDiT)
    return model


def run(objective: Objective, batch: dict[str, Tensor], dtype: str = "fp32", noise: Any = None) -> tuple[Any, Any]:
    """Metrics and gradients of one step in one stage."""
    objective.zero_grad()
    with autocast(dtype, CUDA):
        loss, metrics, _ = objective(on_gpu(batch), 0, noise=noise)
    with backward_pass():
        loss.backward()
    return numbers(metrics), gradients_of(objective)


def long_batch(lengths: tuple[int, ...] = RAGGED) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(96) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(4, 61, mask.shape, generator=generator) * mask
    return {"input_ids": tokens, "attention_mask": mask, "latent": torch.randn(len(lengths), 8, generator=generator)}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """By kind of parameter: a wrong gradient of the few conditioning weights would not show in a norm over all."""
    for kind in KINDS:
        names = [name for name in expected if kind in name]
        ours, theirs = (torch.cat([grads[name].flatten() for name in names]) for grads in (found, expected))
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), kind


@pytest.mark.parametrize("kind", ["plain", "fast"])
@pytest.mark.parametrize("case", CASES)
def test_golden_figures(case: str, kind: str) -> None:
    expected = json.loads(FIGURES.read_text())[f"{case}/ours"]
    model, loss = case_configs(case, lgdlm=False)
    objective = formula_objective(kind, model, loss).to(CUDA)
    metrics, gradients = run(objective, formula_batch(), noise=NoiseOnGpu(torch.arange(3)))
    for name, value in expected["metrics"].items():
        assert metrics[name] == pytest.approx(value, rel=5e-5, abs=5e-5), name
    for gradient, norm in zip(gradients.values(), expected["grad_norm"], strict=True):
        assert float(gradient.norm()) == pytest.approx(norm, rel=5e-4, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["cycle_vae", "l2t", "t2l", "unconditional"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
@pytest.mark.parametrize("lengths", [RAGGED, (96, 96)])
def test_fast_is_plain(loss_type: str, dtype: str, tolerance: float, lengths: tuple[int, ...]) -> None:
    config, loss = model_config(**LONG), LossConfig(loss_type=loss_type, latent_t_mode="random")
    batch = long_batch(lengths)
    expected, expected_gradients = run(formula_objective("plain", config, loss).to(CUDA), batch, dtype)
    found, gradients = run(formula_objective("fast", config, loss).to(CUDA), batch, dtype)
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    if loss_type == "unconditional":
        assert_gradients(gradients, expected_gradients, tolerance)


@pytest.mark.parametrize("lengths", [RAGGED, (96, 96)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.03)])
def test_kernels_are_operations(
    monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float, lengths: tuple[int, ...]
) -> None:
    config, loss = model_config(**LONG), LossConfig(latent_t_mode="random")
    objective = formula_objective("fast", config, loss).to(CUDA)
    assert model_of(objective).way(CUDA) == "kernels"
    _, found = run(objective, long_batch(lengths), dtype)
    for module in ("fast", "cross_entropy"):
        monkeypatch.setattr(f"job.model.{module}.kernels_serve", lambda _: False)
    _, expected = run(objective, long_batch(lengths), dtype)
    assert_gradients(found, expected, tolerance)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_is_not_compiled(dtype: str) -> None:
    config, loss = model_config(**LONG), LossConfig(latent_t_mode="random")
    _, expected = run(formula_objective("fast", config, loss).to(CUDA), long_batch(), dtype)
    compiled = formula_objective("fast", config, loss, TrainingConfig(compile_model=True)).to(CUDA)
    assert model_of(compiled).way(CUDA) == "compiled"
    _, found = run(compiled, long_batch(), dtype)
    assert_gradients(found, expected, 0.02 if dtype == "bf16" else 1e-3)


@pytest.mark.parametrize("loss", [{}, {"cycle_stop_grad_latent": False}, {"loss_type": "unconditional"}])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recorded_is_not_recorded(dtype: str, loss: dict[str, Any]) -> None:
    """Over batches of several shapes in turn, whose gradients are added up, and after weights have changed."""
    config, loss_config = model_config(**LONG), LossConfig(latent_t_mode="random", **loss)
    expected, recorded = (formula_objective("fast", config, loss_config).to(CUDA) for _ in range(2))
    model_of(recorded).recording = True
    for change in (0.0, 0.01):
        for objective in (expected, recorded):
            objective.zero_grad()
            with torch.no_grad():
                for parameter in objective.parameters():
                    parameter.add_(change)
        for lengths in (RAGGED, (96, 96, 96, 96), (90, 41, 71, 8), RAGGED):
            losses = []
            for objective in (expected, recorded):
                base = None
                for stage in objective.stages(0):
                    with autocast(dtype, CUDA):
                        value, metrics, base = objective(on_gpu(long_batch(lengths)), 0, stage, base)
                    value.backward()
                losses.append(numbers(metrics)["loss"])
            assert losses[0] == pytest.approx(losses[1], rel=0.01 if dtype == "bf16" else 1e-5)
        assert_gradients(gradients_of(recorded), gradients_of(expected), 0.03 if dtype == "bf16" else 1e-4)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_products_in_float8(is_recorded: bool) -> None:
    """On a GPU they are as near to bf16 as on a CPU (tests/model/test_float8.py)."""
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("this GPU has no 8-bit floats")
    config, loss = model_config(**LONG), LossConfig(latent_t_mode="random")
    expected, rounded = (formula_objective("fast", config, loss).to(CUDA) for _ in range(2))
    model_of(rounded).in_float8, model_of(rounded).recording = True, is_recorded
    for lengths in (RAGGED, (96, 96, 96, 96)):
        found, theirs = (
            torch.cat([g.flatten() for g in run(o, long_batch(lengths), "bf16")[1].values()])
            for o in (rounded, expected)
        )
        assert 0.001 * theirs.norm() < (found - theirs).norm() < 0.3 * theirs.norm()


@pytest.mark.parametrize("way", ["kernels", "compiled", "recorded", "float8"])
def test_a_step_never_makes_the_host_wait(way: str) -> None:
    training = TrainingConfig(compile_model=way == "compiled", ema_decay=0.9)
    objective = formula_objective("fast", model_config(**LONG), training=training).to(CUDA)
    model_of(objective).recording = way in ("recorded", "float8")
    model_of(objective).in_float8 = way == "float8" and torch.cuda.get_device_capability() >= FP8_CAPABILITY
    optimizer = Optimizer(objective.model, Config(training=training), CUDA)
    batch = on_gpu(long_batch())

    def step(number: int) -> None:
        base = None
        for stage in objective.stages(number):
            with autocast("bf16", CUDA):
                loss, _, base = objective(batch, number, stage, base)
            loss.backward()
        optimizer.step(number)

    for number in range(3):  # workspaces, plans and compiled code are made
        step(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 6):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lengths", [RAGGED, (96, 96)])
def test_bf16_attends_by_the_flash_kernel(lengths: tuple[int, ...]) -> None:
    objective = formula_objective("fast", model_config(**LONG)).to(CUDA)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        run(objective, long_batch(lengths), "bf16")
    kernels = {event.key for event in profiled.key_averages()}
    attention = [name for name in kernels if any(word in name.lower() for word in ("flash", "fmha", "cudnn_sdpa"))]
    assert any("flash" in name.lower() for name in attention), sorted(kernels)
    assert not any("fmha_cutlass" in name for name in attention), attention
    full_rows = torch.empty(len(lengths), 96, 1, LONG["head_dim"], dtype=torch.bfloat16, device=CUDA)
    expected = lengths != RAGGED and (flash4_serves(full_rows) or cudnn_serves(full_rows))
    assert any("merge_forward" in name for name in kernels) == expected, sorted(kernels)


@pytest.mark.parametrize("lengths", [RAGGED, (96, 96)])
def test_flash_attention_4_is_pytorchs(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]) -> None:
    if not flash4_serves(torch.empty(1, 1, LONG["head_dim"], dtype=torch.bfloat16, device=CUDA)):
        pytest.skip("pip install 'cyclevae[flash-attention]', for Hopper and Blackwell GPUs")
    objective = formula_objective("fast", model_config(**LONG), LossConfig(latent_t_mode="random")).to(CUDA)
    _, found = run(objective, long_batch(lengths), "bf16")
    for module in ("end_to_end", "fused_blocks"):
        monkeypatch.setattr(f"job.model.{module}.flash4_serves", lambda _: False)
    _, expected = run(objective, long_batch(lengths), "bf16")
    assert_gradients(found, expected, 0.03)


def test_a_deterministic_step_repeats_every_bit() -> None:
    set_up(TrainingConfig(deterministic=True), CUDA)
    objective = formula_objective("fast", model_config(**LONG)).to(CUDA)
    for dtype in ("fp32", "bf16"):
        once, again = (run(objective, long_batch(), dtype)[1] for _ in range(2))
        different = [name for name in once if not torch.equal(once[name], again[name])]
        assert not different, f"{dtype}: {different}"

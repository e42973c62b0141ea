"""Products in 8-bit floats are those of the rounded numbers, and nothing but texts' products in training is rounded."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import formula_batch, formula_model, model_config
from torch import Tensor

from job.config import TrainingConfig
from job.errors import UserError
from job.model import float8
from job.model.fast import FastMMDiT, weights_of_texts
from job.model.float8 import LARGEST, Weight, quantize, quantize_by_kernel
from job.model.graphs import Graphs, Passes
from job.model.groups import Group, Padding
from job.model.products import Products
from job.runtime.precision import set_up

HALF_A_STEP, HALF_THE_SMALLEST = 2.0**-4, 2.0**-10  # e4m3: relative, and below 2^-6 absolute


def numbers(quantized: tuple[Tensor, Tensor]) -> Tensor:
    values, scales = quantized
    return values.double() * scales.double()


@settings(max_examples=100, deadline=None)
@given(st.integers(-30, 30), st.integers(0, 12), st.integers(0, 10**6))
def test_rows_are_rounded_by_scales_of_their_own(exponent: int, spread: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 48, generator=generator) * 2.0 ** (spread * torch.randn(4, 48, generator=generator))
    x = (x * 2.0**exponent).bfloat16()
    x[2] = 0
    values, scales = quantize(x)
    bound = x.double().abs() * HALF_A_STEP + HALF_THE_SMALLEST * scales.double()
    assert ((numbers((values, scales)) - x.double()).abs() <= bound * (1 + 1e-6)).all()
    assert values.float().abs().amax(1).tolist() == [LARGEST, LARGEST, 0, LARGEST]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_row(bad: float) -> None:
    x, weight = torch.randn(3, 32), torch.randn(16, 32)
    x[1, 5] = bad
    out = Weight(weight).product(x)
    assert out.isfinite().all(1).tolist() == [True, False, True]
    assert out[1].isnan().all()


def test_products_are_those_of_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    # Columns of the gradient and rows of the weight of very different sizes, which must not cost digits.
    sizes = 2.0 ** torch.randint(-8, 8, (48,))
    x, weight, gradient = torch.randn(10, 32), torch.randn(48, 32) * sizes[:, None], torch.randn(10, 48) / sizes
    in_float8 = Weight(weight)
    rounded = numbers((in_float8.rows, in_float8.scales))
    assert torch.equal(in_float8.columns.float(), in_float8.rows.float().T)
    for found, expected, exact in (
        (in_float8.product(x), numbers(quantize(x)) @ rounded.T, x @ weight.T),
        (
            in_float8.product_with_gradient(gradient),
            numbers(quantize(gradient, in_float8.scales)) @ in_float8.rows.double(),
            gradient @ weight,
        ),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5 * float(expected.abs().max()))
        assert (found - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_rounds_its_products_and_not_its_weights_gradient(has_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    bias = torch.randn(16, requires_grad=True) if has_bias else None
    leaves, to_out = [x for x in (x, weight, bias) if x is not None], torch.randn(2, 5, 16).bfloat16()
    found = []
    for in_float8 in ({}, {id(weight): None}):
        with torch.autocast("cpu", torch.bfloat16), Products(in_float8=in_float8):
            out = F.linear(x, weight, bias)
        found.append([out, *torch.autograd.grad(out, leaves, to_out)])
    (out, to_x, *others), (out8, to_x8, *others8) = found
    for ours, theirs in ((out8, out), (to_x8, to_x)):
        assert ours.dtype == theirs.dtype
        assert 0.001 * theirs.norm() < (ours - theirs).norm() < 0.05 * theirs.norm()
    for ours, theirs in zip(others8, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)


@pytest.fixture
def model() -> FastMMDiT:
    built = formula_model(model_config()).train()
    assert isinstance(built, FastMMDiT)
    return built


def case() -> tuple[list[Group], Padding]:
    batch, time = formula_batch((10, 6, 3)), torch.tensor([0.5])
    groups = [Group(batch["input_ids"], batch["latent"], time, time, ("text", "latent"))]
    return groups, Padding(batch["attention_mask"], False, [10, 6, 3])


def outputs_and_gradients(model: FastMMDiT) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        encoded = model.encode(*case())
    (encoded.text.float().square().mean() + encoded.latent.float().square().mean()).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return [encoded.text, encoded.latent, gradients]


def test_a_model_rounds_in_training_only(model: FastMMDiT) -> None:
    exact = outputs_and_gradients(model)
    model.in_float8 = True
    rounded = outputs_and_gradients(model)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert 0.001 * theirs.norm() < (ours - theirs).norm() < 0.3 * theirs.norm()
    model.checkpointing = True
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs_and_gradients(model), rounded, strict=True))
    model.eval()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs_and_gradients(model), exact, strict=True))


def test_graphs_keep_weights_in_float8_and_follow_them(model: FastMMDiT) -> None:
    blocks: Any = model.mmdit.blocks
    weights = [weight for block in blocks for weight in weights_of_texts(block)]
    graphs = Graphs(model, model._trunk, in_float8=weights)
    groups, padding = case()
    text, (group,) = model._text_input(groups, padding).detach(), groups
    inputs = [text, padding.mask, group.latents, group.text_t, group.latent_t]
    for _ in range(2):
        kept = graphs.cast_parameters(torch.bfloat16).in_float8
        assert {id(graphs.parameters[number]) for number in kept} == {id(weight) for weight in weights}
        for number, in_float8 in kept.items():
            fresh = Weight(graphs.parameters[number].bfloat16())
            for ours, theirs in zip(vars(in_float8).values(), vars(fresh).values(), strict=True):
                assert torch.equal(ours.float(), theirs.float())
        with torch.autocast("cpu", torch.bfloat16):
            found = Passes(graphs, inputs, groups, padding, torch.bfloat16).forward()
            expected = model._trunk(text, groups, padding, in_float8=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.5)


@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_products_of_float32_are_refused(dtype: str) -> None:
    with pytest.raises(UserError, match=f"training.fp8=true.*training.dtype={dtype}.*training.dtype=bf16.*out$"):
        set_up(TrainingConfig(fp8=True, dtype=dtype), torch.device("cpu"))


def test_a_gpu_without_such_floats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.runtime.precision.compute_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(UserError, match=r"training.fp8=true: NVIDIA A100.*8\.9.*out$"):
        set_up(TrainingConfig(fp8=True), torch.device("cuda"))


@pytest.mark.kernels
@pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="not by Triton's interpreter: make test-kernels",
)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 48), torch.bfloat16), ((3, 64), torch.float32), ((0, 16), torch.float32)]
)
def test_the_kernel_is_the_operations(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype) * 2.0 ** torch.arange(shape[1]) / 2 ** (shape[1] // 2)
    x[1:2] = 0
    for factors in (None, torch.rand(shape[1], 1)):
        expected, expected_scales = quantize(x, factors)
        with monkeypatch.context() as patch:
            # PyTorch rounds: of 31.9 Triton's interpreter (3.7) makes 16, where a carry reaches the exponent.
            patch.setattr(float8, "TYPE", torch.float32)
            values, scales = quantize_by_kernel(x, factors)
        assert torch.equal(values.to(float8.TYPE).float(), expected.float())
        assert torch.equal(scales, expected_scales)

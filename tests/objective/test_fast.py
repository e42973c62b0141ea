"""The fast implementation is the plain one: losses, gradients and pseudo-tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import formula_batch, formula_objective, gradients_of, model_config, numbers, run
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from job.config import LossConfig, TrainingConfig
from job.model import block_operations, packed
from job.objective.objective import Objective


def assert_same(batch: dict[str, torch.Tensor], loss: dict[str, Any], step: int = 0, **model: Any) -> None:
    config, loss_config = model_config(**model), LossConfig(**loss)
    expected, expected_gradients = run(formula_objective("plain", config, loss_config), batch, step=step)
    found, gradients = run(formula_objective("fast", config, loss_config), batch, step=step)
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


def in_stages(objective: Objective, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """One step, stage after stage; returns the metrics and leaves the gradients."""
    base, metrics = None, {}
    for stage in objective.stages(0):
        loss, metrics, base = objective(batch, 0, stage, base)
        loss.backward()
    return numbers(metrics)


@pytest.mark.parametrize("t_mode", ["full", "random"])
def test_two_stages_add_up_to_one(t_mode: str) -> None:
    batch = formula_batch()
    objective = formula_objective("fast", model_config(), LossConfig(latent_t_mode=t_mode))
    expected, expected_gradients = run(objective, batch)
    objective.zero_grad()
    assert objective.stages(0) == ("base", "cycle")
    assert in_stages(objective, batch) == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients_of(objective).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-7)


def test_nothing_joins_the_stages() -> None:
    # What the first stage returns holds no graph: its activations can be freed before the second stage makes its own.
    _, metrics, base = formula_objective("fast", model_config())(formula_batch(), 0, "base")
    assert metrics == {}
    assert base is not None
    carried = [
        *base.x0.values(),
        *base.tokens.values(),
        base.loss,
        *(v for v in base.metrics.values() if isinstance(v, torch.Tensor)),
    ]
    assert not any(tensor.requires_grad for tensor in carried)


@pytest.fixture
def compiled_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Chooses a backend of torch.compile: without the code generator, which takes minutes, the graphs are the same."""

    def choose(backend: Any) -> None:
        compile_one = block_operations.compile_one

        def with_backend(function: Any) -> Any:
            return compile_one(function, backend=backend)

        monkeypatch.setattr(block_operations, "compiled", cache(with_backend))
        torch._dynamo.reset()
        counters.clear()

    yield choose
    torch._dynamo.reset()


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_blocks_are_few_whole_graphs_for_all_modes_and_lengths(
    compiled_by: Callable[[Any], None], one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fullgraph the graph beyond the limit ends the run, hours after its start when a mode or a short batch comes
    up. And DDP's buckets, tiny ones here, must not cut a graph in pieces."""
    pieces = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        pieces.append(graph)
        return graph.forward

    compiled_by(backend)
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    config = model_config()
    losses = [
        LossConfig(),
        LossConfig(latent_t_mode="random"),
        LossConfig(loss_type="l2t"),
        LossConfig(loss_type="t2l"),
        LossConfig(loss_type="unconditional"),
    ]
    graphs_of_default = 0
    for loss in losses:
        plain = formula_objective("plain", config, loss)
        objective = formula_objective("fast", config, loss, TrainingConfig(compile_model=True))
        on_ranks = DistributedDataParallel(objective, bucket_cap_mb=1e-5, find_unused_parameters=True)
        for lengths in ((5, 3, 10), (2, 9), (7,), (10, 10)):
            batch = formula_batch(lengths, max(lengths))
            _, metrics, _ = on_ranks(batch, 0)
            expected, _ = run(plain, batch)
            assert numbers(metrics) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        graphs_of_default = graphs_of_default or counters["stats"]["unique_graphs"]
    assert graphs_of_default <= 8
    assert graphs_of_default < counters["stats"]["unique_graphs"] <= block_operations.RECOMPILE_LIMIT / 2
    assert len(pieces) == counters["stats"]["unique_graphs"]
    objective.eval()
    run(objective, formula_batch((3,), 9))
    assert len(pieces) == counters["stats"]["unique_graphs"]  # an evaluation is not compiled


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_gradients_in_bf16_are_the_eager_ones(compiled_by: Callable[[Any], None]) -> None:
    """By kind of parameter: a wrong gradient of the few conditioning weights would not show in a norm over all."""
    compiled_by("aot_eager")
    # One block and one encode: four graphs, which is what takes the time.
    config = model_config(n_blocks=1)
    loss = LossConfig(latent_t_mode="random", cycle_text_weight=0.0, cycle_latent_weight=0.0)
    batch = formula_batch((10, 6, 3, 8), 10)
    _, expected = run(formula_objective("fast", config, loss), batch, dtype="bf16")
    compiled = formula_objective("fast", config, loss, TrainingConfig(compile_model=True))
    _, found = run(compiled, batch, dtype="bf16")
    kinds = ("to_cond", "to_post_branch_gammas", "residual_fns", "joint_attn", "feedforwards", "conditioning", "_head")
    for kind in kinds:
        names = [name for name in expected if kind in name]
        ours, theirs = (torch.cat([grads[name].flatten() for name in names]) for grads in (found, expected))
        assert (ours - theirs).norm() <= 0.02 * theirs.norm(), kind


def test_stages_touch_the_same_parameters() -> None:
    # otherwise DDP would wait in the second stage for gradients that were made in the first
    objective, batch = formula_objective("fast", model_config()), formula_batch()
    touched, base = [], None
    for stage in objective.stages(0):
        objective.zero_grad()
        loss, _, base = objective(batch, 0, stage, base)
        loss.backward()
        touched.append({name for name, p in objective.named_parameters() if p.grad is not None})
    assert len(touched) == 2
    assert touched[0] == touched[1]


@pytest.mark.parametrize(
    ("kind", "loss", "stages"),
    [
        ("fast", {}, 2),
        ("plain", {}, 1),
        ("fast", {"cycle_stop_grad_latent": False}, 1),
        ("fast", {"cycle_text_weight": 0.0}, 1),
        ("fast", {"loss_type": "l2t"}, 1),
        ("fast", {"cycle_latent_warmup_steps": 3}, 1),
    ],
)
def test_number_of_stages(kind: str, loss: dict[str, Any], stages: int) -> None:
    assert len(formula_objective(kind, model_config(), LossConfig(**loss)).stages(0)) == stages


@pytest.mark.parametrize(("text", "latent", "passes"), [(0.3, 0.2, 2), (0.3, 0.0, 2), (0.0, 0.2, 2), (0.0, 0.0, 1)])
def test_passes_are_paired_and_terms_of_weight_zero_left_out(text: float, latent: float, passes: int) -> None:
    loss = LossConfig(cycle_text_weight=text, cycle_latent_weight=latent)
    objective, batch = formula_objective("fast", model_config(), loss), formula_batch()
    calls: list[int] = []
    objective.get_submodule("model.latent_encoder").register_forward_hook(
        lambda module, args, output: calls.append(len(args[0]))
    )
    objective(batch, 0)
    assert len(calls) == passes
    assert sum(calls) == 3 * (2 + (text > 0) + (latent > 0))


def test_checkpointing_changes_no_number() -> None:
    config, batch = model_config(dropout=0.3), formula_batch()
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        training = TrainingConfig(activation_checkpointing=checkpointing)
        results.append(run(formula_objective("fast", config, training=training), batch))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient)


def test_bf16_autocast_stays_near_float32() -> None:
    objective, batch = formula_objective("fast", model_config()), formula_batch()
    expected, _ = run(objective, batch)
    found, gradients = run(objective, batch, dtype="bf16")
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients.values())

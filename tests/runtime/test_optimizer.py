from __future__ import annotations

import pytest
import torch

from job.config import Config, ModelConfig, OptimizerConfig, TrainingConfig
from job.model.build import build_model
from job.runtime.optimizer import Optimizer, learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_learning_rate_rises_then_falls_and_stays_at_its_end(schedule: str, warmup: int) -> None:
    optimizer, training = (
        OptimizerConfig(lr=2.0),
        TrainingConfig(lr_schedule=schedule, warmup_steps=warmup, num_train_steps=40),
    )
    rates = [learning_rate(step, optimizer, training) for step in range(60)]
    assert max(rates) == 2.0
    assert rates.index(2.0) == max(0, warmup - 1)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[0] > 0
    assert min(rates) >= 0
    assert rates[40:] == [2.0 if schedule == "constant" else 0.0] * 20


def steps(
    fused: bool, gradients: list[float], clip: float = 0.0, ema: float = 0.5, in_kernel: bool = False
) -> tuple[torch.nn.Linear, Optimizer]:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    config = Config()
    (
        config.optimizer.use_fused,
        config.optimizer.grad_clip_norm,
        config.training.ema_decay,
        config.training.warmup_steps,
    ) = fused, clip, ema, 0
    optimizer = Optimizer(module, config, torch.device("cpu"))
    optimizer.clips_in_kernel = in_kernel
    for step, gradient in enumerate(gradients):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step(step)
    return module, optimizer


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(fused: bool, bad: float) -> None:
    module, optimizer = steps(fused, [1.0, bad, 2.0])
    expected, other = steps(fused, [1.0])
    for parameter in expected.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    other.step(2)
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert optimizer.average is not None
    assert other.average is not None
    assert all(torch.equal(a, b) for a, b in zip(optimizer.average, other.average, strict=True))
    assert [
        int(count) for count in (optimizer.nonfinite_steps, optimizer.nonfinite_in_a_row, optimizer.bad_parameter)
    ] == [1, 0, 0]


def test_clipping_bounds_the_norm_and_reports_the_one_before() -> None:
    module = torch.nn.Linear(3, 2)
    config = Config()
    config.optimizer.grad_clip_norm = 0.5
    optimizer = Optimizer(module, config, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    optimizer.adamw.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    )
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    assert float(optimizer.step(0)) == pytest.approx(3 * 8**0.5)
    assert float(seen[0].norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("gradients", [[1.0, 0.01, 8.0], [1.0, float("nan"), 8.0], [float("inf"), 1.0]])
def test_a_kernel_clips_as_a_product_does(gradients: list[float]) -> None:
    """By Adam's moments: its steps are nearly the same whatever a gradient is multiplied with."""
    (_, expected), (_, found), (_, unclipped) = (
        steps(True, gradients, clip=0.5),
        steps(True, gradients, clip=0.5, in_kernel=True),
        steps(True, gradients),
    )
    for parameter, ours in zip(expected.parameters, found.parameters, strict=True):
        torch.testing.assert_close(ours, parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(found.adamw.state[ours][moment], expected.adamw.state[parameter][moment])
    assert not torch.allclose(
        found.adamw.state[found.parameters[0]]["exp_avg"], unclipped.adamw.state[unclipped.parameters[0]]["exp_avg"]
    )


def test_only_matrices_decay() -> None:
    model = build_model(
        ModelConfig(hidden_size=32, n_blocks=1, n_heads=2, head_dim=16, cond_dim=32, max_seq_len=8), 16, 4, seed=0
    )
    matrices = Optimizer(model, Config(), torch.device("cpu")).adamw.param_groups[0]["params"]
    decaying = {name for name, parameter in model.named_parameters() if any(parameter is matrix for matrix in matrices)}
    assert "text_head.weight" in decaying
    assert "mmdit.blocks.0.joint_attn.to_qkv.0.weight" in decaying
    assert not [
        name
        for name in decaying
        if name.endswith(("bias", ".gamma", ".g")) or "embed" in name or "residual_fns" in name
    ]


def test_the_average_takes_the_weights_place_and_gives_it_back() -> None:
    module, optimizer = steps(True, [1.0, 1.0], ema=0.5)
    before = [p.detach().clone() for p in module.parameters()]
    with optimizer.averaged():
        assert optimizer.average is not None
        assert all(torch.equal(p, a) for p, a in zip(module.parameters(), optimizer.average, strict=True))
        assert not torch.equal(next(module.parameters()), before[0])
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))

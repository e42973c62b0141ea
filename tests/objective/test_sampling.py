"""Generation: exact results of models whose answers are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from job.config import Config, ModelConfig
from job.model.plain import PlainMMDiT
from job.objective.objective import Objective
from job.objective.sampling import generate

VOCAB, DIM, MASK_ID = 9, 3, 1
LENGTHS = torch.tensor([2, 5, 7])
MASK = torch.arange(8) < LENGTHS[:, None]
TARGET = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0], [2.0, 2.0, -1.0]])


class Known(nn.Module):
    """Wants token 2 + place % 7 everywhere, surer the further back, and always the same latents.

    Records what it is shown.
    """

    latent_dim, every_head = DIM, False
    encode, logits = PlainMMDiT.encode, PlainMMDiT.logits

    def __init__(self, schedule_of: list[Objective]) -> None:
        super().__init__()
        self.schedule_of = schedule_of
        self.shown: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(
        self, tokens: Tensor, latents: Tensor, text_t: Tensor, latent_t: Tensor, mask: Tensor, heads: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        self.shown.append((tokens.clone(), text_t, latent_t))
        places = torch.arange(tokens.shape[1])
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[:, places, 2 + places % 7] = 2.0 + places
        logits[..., MASK_ID] = 50.0  # never to be taken
        schedule = self.schedule_of[0].schedule
        alpha, sigma = schedule.alpha_sigma(latent_t)
        target = TARGET[torch.arange(tokens.shape[0]) % len(TARGET)]
        eps = (latents - alpha * target) / sigma.clamp(min=1e-6)
        prediction = {"x0": target, "epsilon": eps, "v_param": alpha * eps - sigma * target}[schedule.parameterization]
        return logits, prediction


def objective_of(parameterization: str = "v_param") -> tuple[Objective, Known]:
    box: list[Objective] = []
    model = Known(box)
    config = Config(model=ModelConfig(max_seq_len=8, latent_parameterization=parameterization))
    box.append(Objective(model, config, MASK_ID))  # type: ignore[arg-type]
    return box[0], model


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_text_is_filled_in_from_the_surest_place(steps: int) -> None:
    objective, model = objective_of()
    words, latent = generate(objective, MASK, latent=TARGET, steps=steps)
    wanted = (2 + torch.arange(8) % 7).expand(3, -1)
    assert torch.equal(words[MASK], wanted[MASK])
    assert torch.equal(latent, TARGET)
    assert len(model.shown) == steps
    for step, (tokens, text_t, latent_t) in enumerate(model.shown):
        masked = (tokens == MASK_ID).sum(1)
        assert torch.equal(masked, LENGTHS * (steps - step) // steps)
        for row, count in zip(tokens, masked, strict=True):  # what is left is the front, the least sure
            assert (row[:count] == MASK_ID).all()
        assert text_t.tolist() == pytest.approx([1 - step / steps] * 3)
        assert latent_t.tolist() == [0] * 3


@pytest.mark.parametrize("parameterization", ["x0", "epsilon", "v_param"])
@pytest.mark.parametrize("steps", [1, 4])
def test_latents_arrive_where_the_model_points(parameterization: str, steps: int) -> None:
    objective, model = objective_of(parameterization)
    tokens = torch.full((3, 8), 4)
    words, latent = generate(objective, MASK, tokens=tokens, steps=steps)
    # at t=1 alpha is 1.6e-5: epsilon's first x0 is rounding error times 64,000
    torch.testing.assert_close(latent, TARGET, atol=1e-4 if parameterization != "epsilon" else 0.3, rtol=1e-4)
    assert torch.equal(words, tokens)
    assert [latent_t[0].item() for _, _, latent_t in model.shown] == pytest.approx(
        [1 - k / steps for k in range(steps)]
    )
    assert all(text_t.tolist() == [0] * 3 for _, text_t, _ in model.shown)


def test_both_from_noise_share_the_time_and_depend_on_the_seed_alone() -> None:
    objective, model = objective_of()
    first = generate(objective, MASK, steps=5, temperature=3.0, seed=1)
    assert all(torch.equal(text_t, latent_t) for _, text_t, latent_t in model.shown)
    assert not (first[0][MASK] == MASK_ID).any()
    torch.manual_seed(7)
    again, other = (generate(objective, MASK, steps=5, temperature=3.0, seed=seed) for seed in (1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_temperature_one_draws_from_the_distribution() -> None:
    objective, _ = objective_of()
    rows = 400
    mask = torch.ones(rows, 1, dtype=torch.bool)
    words, _ = generate(objective, mask, latent=torch.zeros(rows, DIM), temperature=1.0)
    expected = torch.tensor([0.0, -torch.inf] + [2.0] + [0.0] * (VOCAB - 3)).softmax(0)[2].item()
    assert (words == 2).double().mean().item() == pytest.approx(expected, abs=0.1)

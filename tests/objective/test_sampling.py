"""Generation: exact results of models whose answers are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from job.config import Config, DecodingConfig, ModelConfig
from job.model.groups import Padding
from job.model.plain import PlainMMDiT
from job.objective.objective import Objective
from job.objective.sampling import drawn, first_choices, generate, nucleus

VOCAB, DIM, MASK_ID, PAD_ID = 9, 3, 1, 0
LENGTHS = torch.tensor([2, 5, 7])
MASK = torch.arange(8) < LENGTHS[:, None]
TARGET = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0], [2.0, 2.0, -1.0]])


class Known(nn.Module):
    """Wants token 2 + place % 7 everywhere, surer the further back, and always the same latents.

    Records what it is shown.
    """

    latent_dim, vocab_size, every_head = DIM, VOCAB, False
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
        logits[..., [MASK_ID, PAD_ID]] = 50.0  # never to be taken
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
    box.append(Objective(model, config, MASK_ID, PAD_ID))  # type: ignore[arg-type]
    return box[0], model


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_text_is_filled_in_from_the_surest_place(steps: int) -> None:
    objective, model = objective_of()
    words, latent = generate(objective, MASK, latent=TARGET, decoding=DecodingConfig(steps=steps))
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
    words, latent = generate(objective, MASK, tokens=tokens, decoding=DecodingConfig(latent_steps=steps))
    # at t=1 alpha is 1.6e-5: epsilon's first x0 is rounding error times 64,000
    torch.testing.assert_close(latent, TARGET, atol=1e-4 if parameterization != "epsilon" else 0.3, rtol=1e-4)
    assert torch.equal(words, tokens)
    assert [latent_t[0].item() for _, _, latent_t in model.shown] == pytest.approx(
        [1 - k / steps for k in range(steps)]
    )
    assert all(text_t.tolist() == [0] * 3 for _, text_t, _ in model.shown)


def test_both_from_noise_share_the_time_and_depend_on_the_seed_alone() -> None:
    objective, model = objective_of()
    drawn = DecodingConfig(steps=5, temperature=3.0)
    first = generate(objective, MASK, decoding=drawn, seed=1)
    assert all(torch.equal(text_t, latent_t) for _, text_t, latent_t in model.shown)
    assert not (first[0][MASK] == MASK_ID).any()
    torch.manual_seed(7)
    again, other = (generate(objective, MASK, decoding=drawn, seed=seed) for seed in (1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_temperature_one_draws_from_the_distribution() -> None:
    objective, _ = objective_of()
    rows = 400
    mask = torch.ones(rows, 1, dtype=torch.bool)
    words, _ = generate(objective, mask, latent=torch.zeros(rows, DIM), decoding=DecodingConfig(temperature=1.0))
    expected = torch.tensor([-torch.inf, -torch.inf] + [2.0] + [0.0] * (VOCAB - 3)).softmax(0)[2].item()
    assert (words == 2).double().mean().item() == pytest.approx(expected, abs=0.1)


def test_a_draw_takes_the_token_in_whose_share_it_falls() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.375, 0.125, 0.0])
    uniform = torch.tensor([0.0, 0.4999, 0.5, 0.8749, 0.875, 1 - 2**-24])
    wanted = [1, 1, 3, 3, 4, 4]
    assert drawn(p, uniform).tolist() == wanted
    assert drawn(0.3 * p, uniform).tolist() == wanted  # as of a part, which top_p leaves
    # Two draws for each of three places that differ.
    places = torch.stack([p, p.flip(0), p]).expand(1, 3, 6)
    assert drawn(places, uniform.view(2, 1, 3)).tolist() == [[[1, 2, 3]], [[3, 4, 4]]]


@pytest.mark.parametrize("steps", [1, 3])
def test_several_texts_of_one_first_pass_are_what_each_would_be_alone(steps: int) -> None:
    objective, model = objective_of()
    ways = [DecodingConfig(steps=steps, temperature=temperature) for temperature in (0.0, 2.0, 2.0)]
    template = torch.where(MASK, MASK_ID, PAD_ID)
    template[:, 0] = 4
    alone = [
        generate(objective, MASK, tokens=template, latent=TARGET, decoding=way, seed=seed)[0]
        for seed, way in enumerate(ways)
    ]
    assert not torch.equal(alone[1], alone[2])
    shown = len(model.shown)
    choices = first_choices(objective, MASK, template, TARGET, ways, range(3), torch.arange(3))
    together = [
        generate(objective, MASK, tokens=template, latent=TARGET, decoding=way, seed=seed, first=first)[0]
        for seed, (way, first) in enumerate(zip(ways, choices, strict=True))
    ]
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
    assert len(model.shown) - shown == 1 + 3 * (steps - 1)


def test_top_p_draws_among_the_likeliest_alone() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    kept = {top_p: (nucleus(p, top_p) > 0)[0].tolist() for top_p in (0.4, 0.6, 0.8001, 1.0)}
    assert kept == {
        0.4: [True, False, False, False],
        0.6: [True, True, False, False],
        0.8001: [True, True, True, False],
        1.0: [True, True, True, True],
    }
    objective, _ = objective_of()
    mask = torch.ones(200, 1, dtype=torch.bool)
    decoding = DecodingConfig(temperature=1.0, top_p=0.3)  # the likeliest token of place 0 has more than that
    words, _ = generate(objective, mask, latent=torch.zeros(200, DIM), decoding=decoding)
    assert (words == 2).all()


@pytest.mark.parametrize("remasking", [0.0, 0.5])
def test_what_was_given_stays_and_every_hole_is_filled(remasking: float) -> None:
    objective, model = objective_of()
    given = torch.full((3, 8), PAD_ID)
    given[MASK] = MASK_ID
    given[:, 1] = 7
    given[2, 4] = 3
    decoding = DecodingConfig(steps=4, temperature=2.0, remasking=remasking)
    words, _ = generate(objective, MASK, tokens=given, latent=TARGET, decoding=decoding)
    kept = given != MASK_ID
    assert torch.equal(words[kept], given[kept])
    assert not torch.isin(words[MASK], torch.tensor([MASK_ID, PAD_ID])).any()
    holes = ((given == MASK_ID) & MASK).sum(1)
    for step, (tokens, text_t, _) in enumerate(model.shown):
        assert torch.equal(((tokens == MASK_ID) & MASK).sum(1), holes * (4 - step) // 4)
        torch.testing.assert_close(text_t, (1 - step / 4) * holes / LENGTHS)  # the share of the text that is masked


def test_remasking_masks_the_least_sure_tokens_again() -> None:
    """The front of a text is the least sure, so it is filled in last; what was filled in before is masked again."""
    objective, model = objective_of()
    mask = torch.ones(1, 8, dtype=torch.bool)
    generate(objective, mask, latent=TARGET[:1], decoding=DecodingConfig(steps=4, remasking=0.5))
    shown = [(tokens[0] == MASK_ID).tolist() for tokens, _, _ in model.shown]
    # Pass 1 fills the two places at the back. Pass 2 masks one of them again and fills three.
    assert shown[1] == [True] * 6 + [False] * 2
    assert shown[2] == [True] * 3 + [False] * 3 + [True, False]
    assert [sum(masked) for masked in shown] == [8, 6, 4, 2]


@pytest.mark.parametrize("decoding", [{}, {"steps": 3, "remasking": 0.5}, {"temperature": 1.0}, {"temperature": 1e-45}])
def test_the_mask_token_stays_where_probabilities_are_not_finite(
    decoding: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, model = objective_of()
    at_temperature = decoding.get("temperature", 1.0)
    broken = torch.inf if at_temperature == 1.0 else 1.0  # of finite logits 1 / temperature is not
    whole = [] if at_temperature != 1.0 else [0, 2]

    def logits(text: Tensor, padding: Padding) -> Tensor:
        text[1] *= broken
        return text

    monkeypatch.setattr(model, "logits", logits)
    words, _ = generate(objective, MASK, latent=TARGET, decoding=DecodingConfig(**decoding))
    assert (words[1][MASK[1]] == MASK_ID).all()
    assert not (words[whole] == MASK_ID).any()
    tokens = torch.where(MASK, MASK_ID, 0)
    (chosen,) = first_choices(objective, MASK, tokens, TARGET, [DecodingConfig(**decoding)], [0], torch.arange(3))
    assert chosen.confidence[1].isnan().all()
    assert chosen.confidence[whole].isfinite().all()


def test_one_pass_is_the_likeliest_token_of_every_place() -> None:
    objective, _ = objective_of()
    words, _ = generate(objective, MASK, latent=TARGET)
    assert torch.equal(words[MASK], (2 + torch.arange(8) % 7).expand(3, -1)[MASK])

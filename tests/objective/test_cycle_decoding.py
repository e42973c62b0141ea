"""Decoding that checks itself: candidates and corrections, with a model whose two directions are known exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from job.config import Config, DecodingConfig, ModelConfig
from job.model.plain import PlainMMDiT
from job.objective.cycle_decoding import decode, encode
from job.objective.objective import Objective

VOCAB, MASK_ID, PAD_ID = 8, 1, 0
LENGTHS = torch.tensor([1, 4, 6])
MASK = torch.arange(6) < LENGTHS[:, None]
TEXTS = torch.where(MASK, 2 + torch.tensor([[3, 0, 0, 0, 0, 0], [1, 2, 2, 4, 0, 0], [5, 0, 0, 3, 1, 4]]), PAD_ID)


class BagOfWords(nn.Module):
    """Encodes a text as its counts of words, exactly; decodes any latent to words drawn without looking at it.

    So only the check by encoding can find the text that belongs to a latent.
    """

    latent_dim, every_head = VOCAB, False
    encode, logits = PlainMMDiT.encode, PlainMMDiT.logits

    def __init__(self) -> None:
        super().__init__()
        self.decoded = 0
        self.encoded = 0

    def forward(
        self, tokens: Tensor, latents: Tensor, text_t: Tensor, latent_t: Tensor, mask: Tensor, heads: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        self.decoded += "text" in heads
        self.encoded += len(tokens) * ("latent" in heads)
        assert "text" in heads or not (tokens == MASK_ID)[mask].any()  # T2L has only seen clean texts
        counts = nn.functional.one_hot(tokens, VOCAB).float().masked_fill(~mask[..., None], 0).sum(1)
        return torch.zeros(*tokens.shape, VOCAB), counts


def objective() -> tuple[Objective, BagOfWords]:
    model = BagOfWords()
    config = Config(model=ModelConfig(max_seq_len=8, latent_parameterization="x0"))
    return Objective(model, config, MASK_ID, PAD_ID), model  # type: ignore[arg-type]


def distance(made: Tensor, wanted: Tensor) -> Tensor:
    tested, _ = objective()
    return (encode(tested, made, MASK) - wanted).square().sum(1)


def test_more_candidates_never_come_less_near() -> None:
    tested, _ = objective()
    wanted = encode(tested, TEXTS, MASK)
    distances = torch.stack(
        [
            distance(decode(tested, wanted, MASK, DecodingConfig(temperature=1.0, candidates=number), seed=3), wanted)
            for number in (2, 8, 32)
        ]
    )
    assert (distances.diff(dim=0) <= 0).all()
    assert distances[-1].sum() < distances[0].sum()
    assert distances[-1, 0] == 0  # six words, one place


def test_many_candidates_cost_one_pass_and_an_encoding_of_each_different_text() -> None:
    tested, model = objective()
    wanted = encode(tested, TEXTS, MASK)
    model.encoded = 0
    mask, wanted = MASK[:1], wanted[:1]  # one token, for which there are six
    decode(tested, wanted, mask, DecodingConfig(temperature=1.0, candidates=100))
    assert (model.decoded, model.encoded) == (1, 6)


def test_corrections_find_every_word_of_a_text() -> None:
    tested, _ = objective()
    wanted = encode(tested, TEXTS, MASK)
    decoding = DecodingConfig(temperature=1.0, candidates=6, corrections=24)
    made = decode(tested, wanted, MASK, decoding, seed=1)
    assert distance(made, wanted).tolist() == [0, 0, 0]
    assert not torch.isin(made[MASK], torch.tensor([MASK_ID, PAD_ID])).any()
    before = decode(tested, wanted, MASK, DecodingConfig(temperature=1.0, candidates=6), seed=1)
    assert distance(before, wanted).sum() > 0


def test_a_text_that_is_right_stays_as_it_is() -> None:
    tested, _ = objective()
    wanted = encode(tested, TEXTS, MASK)
    decoding = DecodingConfig(temperature=1.0, candidates=2, corrections=5)
    template = TEXTS.clone()
    template[2, 3] = MASK_ID  # one word is missing, and six are to be tried
    made = decode(tested, wanted, MASK, decoding, tokens=template)
    fixed = template != MASK_ID
    assert torch.equal(made[fixed], template[fixed])


@pytest.mark.parametrize("decoding", [DecodingConfig(temperature=1.0), DecodingConfig(temperature=1.0, candidates=3)])
def test_a_row_does_not_depend_on_its_batch(decoding: DecodingConfig) -> None:
    tested, _ = objective()
    wanted = encode(tested, TEXTS, MASK)
    together = decode(tested, wanted, MASK, decoding, seed=5)
    alone = decode(tested, wanted[1:2], MASK[1:2], decoding, seed=5, numbers=torch.tensor([1]))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together, decode(tested, wanted, MASK, decoding, seed=6))


def test_plain_decoding_makes_no_check() -> None:
    tested, model = objective()
    decode(tested, torch.zeros(3, VOCAB), MASK)
    assert model.decoded == 1

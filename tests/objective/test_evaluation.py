"""Evaluation: exact figures of models whose answers are known, and independence of batch size and ranks."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from job.config import Config, DecodingConfig, ModelConfig
from job.errors import UserError
from job.model.build import build_model
from job.model.plain import PlainMMDiT
from job.monitoring.evaluation_table import table, verdicts
from job.objective import sampling
from job.objective.evaluation import Samples, evaluate, participation_ratio, retrieval
from job.objective.objective import Objective
from job.objective.text_scores import TextScoring, distinct_pairs, most_frequent_at_place_accuracy, repeats

VOCAB, DIM, LENGTH, COUNT, MASK_ID = 12, 12, 8, 6, 1
MODEL = ModelConfig(
    hidden_size=16,
    n_blocks=1,
    n_heads=2,
    head_dim=8,
    cond_dim=16,
    max_seq_len=LENGTH,
    num_residual_streams=1,
    latent_parameterization="x0",
)

# All but one of the texts are made, by passes that draw.
SCORING = TextScoring(DecodingConfig(steps=2, temperature=1.0), COUNT - 1, special=[5], detokenize=str)


def samples() -> dict[str, Tensor]:
    """Text i is i + 2 tokens of kind i + 4 and its latent the unit vector of that kind."""
    kinds = torch.arange(COUNT) + 4
    lengths = torch.arange(COUNT) + 2
    return {
        "input_ids": kinds[:, None].expand(-1, LENGTH).clone(),
        "attention_mask": torch.arange(LENGTH) < lengths[:, None],
        "latent": torch.eye(DIM)[kinds],
        "position": torch.arange(COUNT),
        "global_lengths": lengths,
    }


class Oracle(nn.Module):
    """Reads the token off the latent and the latent off the tokens, or ignores what it is given."""

    latent_dim, vocab_size, every_head = DIM, VOCAB, False
    encode, logits = PlainMMDiT.encode, PlainMMDiT.logits

    def __init__(self, sees_latent: bool = True, sees_text: bool = True) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.sees_latent, self.sees_text = sees_latent, sees_text

    def forward(
        self, tokens: Tensor, latents: Tensor, text_t: Tensor, latent_t: Tensor, mask: Tensor, heads: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        words = nn.functional.one_hot(tokens, DIM).float()
        mean = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits = 5 * latents[:, None].expand(-1, tokens.shape[1], -1)
        prediction = mean if self.sees_text else torch.ones(tokens.shape[0], DIM) / DIM
        return (logits if self.sees_latent else torch.zeros_like(logits)), prediction


def objective_of(model: nn.Module) -> Objective:
    return Objective(model, Config(model=MODEL), MASK_ID)  # type: ignore[arg-type]


def test_oracle_scores_are_the_closed_form_ones() -> None:
    metrics = evaluate(objective_of(Oracle()), [samples()], seed=0)
    log_z = math.log(math.exp(5) + VOCAB - 1)
    assert metrics["l2t/ce"] == pytest.approx(log_z - 5, rel=1e-5)
    assert metrics["l2t/latent_gain"] == pytest.approx(5, rel=1e-5)
    assert metrics["l2t/token_acc"] == metrics["t2l2t/token_acc"] == metrics["l2t2l/retrieval_at_1"] == 1
    assert metrics["l2t2l/cos"] == pytest.approx(1)
    p = math.exp(5 - log_z)
    rest = (1 - p) / (VOCAB - 1)
    assert metrics["pseudo/entropy"] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(rest), rel=1e-5)
    for suffix in ("", "@0.25", "@0.5", "@0.9"):
        assert metrics[f"t2l/x0_cos{suffix}"] == pytest.approx(1)
        assert metrics[f"t2l/x0_mse{suffix}"] == pytest.approx(0)
        assert metrics[f"t2l/x0_norm_ratio{suffix}"] == pytest.approx(1)
    assert metrics["t2l/text_gain"] == pytest.approx(2 / DIM)
    assert metrics["latent/active_dims"] == pytest.approx(COUNT - 1)  # COUNT unit vectors around their mean
    assert metrics["tokens"] == sum(range(2, COUNT + 2))
    assert metrics["text/most_frequent_token_acc"] == pytest.approx((COUNT + 1) / metrics["tokens"])
    assert [word in " ".join(verdicts(metrics)) for word in ("ignores", "uses the latent", "uses the text")] == [
        False,
        True,
        True,
    ]


def test_a_broken_cycle_shows_while_the_encoder_is_right() -> None:
    metrics = evaluate(
        objective_of(Oracle(sees_latent=False)), [samples()], seed=0
    )  # decodes token 0, which no text holds
    assert metrics["t2l/x0_cos"] == pytest.approx(1)
    assert metrics["l2t2l/cos"] == pytest.approx(0)
    assert metrics["l2t2l/retrieval_at_1"] == pytest.approx(1 / COUNT)  # all equally far


def test_models_that_ignore_their_input_are_said_to() -> None:
    metrics = evaluate(objective_of(Oracle(sees_latent=False, sees_text=False)), [samples()], seed=0)
    assert metrics["l2t/latent_gain"] == pytest.approx(0, abs=1e-6)
    assert metrics["t2l/text_gain"] == pytest.approx(0, abs=1e-6)
    assert metrics["latent/active_dims"] == 0
    words = table(metrics)
    assert "the decoder ignores the latent" in words
    assert "the encoder ignores the text" in words
    assert "is no better than always guessing" in words


def test_non_finite_figures_are_not_called_good() -> None:
    metrics = evaluate(objective_of(Oracle()), [samples() | {"latent": torch.full((COUNT, DIM), math.nan)}], seed=0)
    assert "broken" in verdicts(metrics)[0]


def batches_of(size: int) -> list[dict[str, Tensor]]:
    whole = samples()
    parts = [
        {name: values[i : i + size] for name, values in whole.items()} | {"global_lengths": whole["global_lengths"]}
        for i in range(0, COUNT, size)
    ]
    for part in parts:  # a short batch is padded less
        longest = int(part["attention_mask"].sum(1).max())
        part |= {name: part[name][:, :longest] for name in ("input_ids", "attention_mask")}
    return parts


def on_ranks(objective: Objective, batches: list[dict[str, Tensor]], world_size: int) -> list[dict[str, float]]:
    """Evaluate with batch j on rank j % world_size, a thread each."""
    barrier = threading.Barrier(world_size, timeout=30)
    shelf: list[Samples] = [{} for _ in range(world_size)]
    results: list[dict[str, float]] = [{} for _ in range(world_size)]

    def work(rank: int) -> None:
        def gather(rows: Samples) -> list[Samples]:
            shelf[rank] = rows
            barrier.wait()
            gathered = list(shelf)
            barrier.wait()
            return gathered

        results[rank] = evaluate(objective, batches[rank::world_size], 3, gather, barrier.wait, SCORING)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    ("batch_size", "world_size"), [(1, 1), (4, 1), (1, 2), (4, 2), (2, 4)]
)  # 2 on 4 ranks: one rank has no batch
def test_batch_size_and_ranks_do_not_change_the_figures(batch_size: int, world_size: int) -> None:
    objective = objective_of(build_model(MODEL, VOCAB, DIM, seed=0))
    expected = evaluate(objective, [samples()], seed=3, scoring=SCORING)
    results = on_ranks(objective, batches_of(batch_size), world_size)
    assert expected["t2l2t/exact_match"] >= 0  # measured on ranks too
    assert all(result == results[0] for result in results)
    assert results[0] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_fast_and_plain_models_are_measured_alike(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "ELEMENTS_AT_A_TIME", chunk)
    models = (replace(MODEL, implementation=name, num_residual_streams=2) for name in ("plain", "fast"))
    plain, fast = (
        evaluate(
            Objective(build_model(m, VOCAB, DIM, seed=0), Config(model=m), MASK_ID),
            [samples()],
            seed=3,
        )
        for m in models
    )
    assert fast == pytest.approx(plain, rel=1e-4, abs=1e-6)


def test_noise_depends_on_the_seed_alone_and_training_mode_returns() -> None:
    objective = objective_of(build_model(MODEL, VOCAB, DIM, seed=0)).train()
    first = evaluate(objective, [samples()], seed=3)
    torch.manual_seed(99)
    assert objective.training
    assert evaluate(objective, [samples()], seed=3) == first
    assert evaluate(objective, [samples()], seed=4) != first


def test_one_sample_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="at least 2 samples"):
        evaluate(objective_of(Oracle()), batches_of(1)[:1], seed=0)


def test_participation_ratio_counts_equal_directions() -> None:
    rows = (
        torch.cat([torch.eye(5), -torch.eye(5)])
        @ torch.linalg.qr(torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).T)[0].T
    )
    assert participation_ratio(rows) == pytest.approx(5)


def test_texts_of_an_oracle_come_back_whole() -> None:
    scoring = TextScoring(DecodingConfig(), COUNT, detokenize=lambda ids: " ".join(f"w{i}" for i in ids))
    metrics = evaluate(objective_of(Oracle()), [samples()], seed=0, scoring=scoring)
    for name in ("l2t", "t2l2t"):
        assert metrics[f"{name}/exact_match"] == metrics[f"{name}/decoded_token_acc"] == 1
        assert metrics[f"{name}/bleu"] == pytest.approx(100)
        assert metrics[f"{name}/chrf"] == pytest.approx(100)
    assert metrics["t2l2t/repeats"] == metrics["text/repeats"] == 1  # every text is one token again and again
    blind = evaluate(objective_of(Oracle(sees_latent=False)), [samples()], seed=0, scoring=scoring)
    assert blind["t2l2t/exact_match"] == blind["t2l2t/bleu"] == 0


def test_special_tokens_count_in_no_accuracy() -> None:
    """[CLS] and [SEP] stand in every text and are right without any model."""
    framed = samples()
    framed["input_ids"][:, 0] = 3
    framed["input_ids"][torch.arange(COUNT), framed["attention_mask"].sum(1) - 1] = 3
    blind = objective_of(Oracle(sees_latent=False))
    for special, floor in (([], 2 * COUNT), ([3], COUNT - 1)):  # the longest text has COUNT - 1 words of its kind
        metrics = evaluate(blind, [framed], seed=0, scoring=TextScoring(special=special))
        words = int(framed["attention_mask"].sum()) - (2 * COUNT if special else 0)
        assert metrics["text/most_frequent_token_acc"] == pytest.approx(floor / words)
    assert metrics["tokens"] == framed["attention_mask"].sum()
    # What the true latents decode to is right for the words, and wrong for what frames them.
    seeing = evaluate(objective_of(Oracle()), [framed], seed=0, scoring=TextScoring(special=[3]))
    assert seeing["l2t/token_acc"] == 1


def test_guessing_at_places_knows_the_other_texts_alone() -> None:
    tokens = torch.tensor([[2, 3, 9, 4], [2, 5, 4, 0], [2, 6, 7, 4], [8, 4, 0, 0]])
    mask = tokens != 0
    # First places: 2 in three texts of four, last ones: 4 in all; the others are guessed wrong. Of a tie half counts:
    # for a text with 2 in front the others say 2, 2, 8.
    assert most_frequent_at_place_accuracy(tokens, mask, mask) == pytest.approx((3 + 4) / 13)
    lone = torch.tensor([[2, 3], [4, 5]])  # each token is the only one of its kind
    assert most_frequent_at_place_accuracy(lone, lone > 0, lone > 0) == 0


def test_repeats_and_distinct_pairs_leave_padding_out() -> None:
    tokens = torch.tensor([[2, 2, 3, 0, 0], [2, 2, 2, 2, 0]])
    mask = tokens != 0
    assert repeats(tokens, mask) == pytest.approx(4 / 5)
    assert distinct_pairs(tokens, mask) == pytest.approx(2 / 5)


def test_retrieval_counts_ties_as_chances() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.9, 0.8, 0.7, 0.1], [0.0, 0.0, 0.0, 1.0]])
    assert retrieval(similarity, 1) == pytest.approx((1 + 1 / 4 + 0 + 1) / 4)
    assert retrieval(similarity, 3) == pytest.approx((1 + 3 / 4 + 1 + 1) / 4)


def test_a_broken_model_retrieves_nothing() -> None:
    """NaN is neither smaller than another nor equal to it."""
    assert math.isnan(retrieval(torch.full((4, 4), math.nan), 1))

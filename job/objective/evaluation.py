"""How well both directions work on held-out samples: fixed noise, per token, padding excluded.

Every figure is computed from rows, one per sample, that are gathered over ranks and put in order first. So neither the
batch size nor the number of ranks changes what is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from job.errors import UserError
from job.objective.cycle_decoding import decode, encode
from job.objective.inputs import Batch, Inputs
from job.objective.noise import StepNoise
from job.objective.objective import Objective
from job.objective.sampling import rows_at_a_time
from job.objective.text_scores import (
    TextScoring,
    most_frequent_accuracy,
    most_frequent_at_place_accuracy,
    scores_of_generated,
)

Samples = dict[str, Tensor]  # columns by name, one row a sample; "position" [n] is its place in the evaluation set
Gather = Callable[[Samples], list[Samples]]
NOISY_T = (0.25, 0.5, 0.9)  # latent timesteps that are measured besides t = 1, where generation starts
NO_TEXTS = TextScoring()


def one_rank(rows: Samples) -> list[Samples]:
    """The gathered rows of a single process."""
    return [rows]


@torch.no_grad()
def evaluate(
    objective: Objective,
    batches: Iterable[Batch],
    seed: int,
    gather: Gather = one_rank,
    between: Callable[[], object] = lambda: None,
    scoring: TextScoring = NO_TEXTS,
) -> dict[str, float]:
    """Metrics by name of this rank's evaluation batches, whose `position` is the place in the evaluation set.

    Of the first scoring.count texts it is also measured what comes of them when they are decoded as scoring.decoding
    says. `gather` returns every rank's rows (CPU tensors [n, ...]; none for a rank without batches), and all ranks
    return the same metrics. `between` is called before each batch, equally often on every rank, and may raise to stop.
    Raises UserError for fewer than two samples, since nothing could be shuffled then.
    """
    batches = list(batches)
    samples = _in_order(gather(_concatenate([_lent(objective, batch) for batch in batches])))
    count = samples["position"].numel()
    if count < 2:
        raise UserError(f"evaluation needs at least 2 samples, found {count}; prepare a larger validation split")
    # A rank may have a batch less than others, but must come to `between` as often: all ranks agree on a stop there.
    rounds = max(int(other["batches"]) for other in gather({"batches": torch.tensor(len(batches))}))
    rows, made = [], []
    was_training = objective.training
    objective.eval()
    try:
        for number in range(rounds):
            between()
            if number < len(batches):
                rows += [
                    _measure(objective, part, samples, seed, scoring) for part in _parts(objective, batches[number])
                ]
                made.append(_made_texts(objective, batches[number], seed, scoring))
    finally:
        objective.train(was_training)
    metrics = _summary(_in_order(gather(_concatenate(rows))), samples, scoring)
    if scoring.count:
        metrics |= _summary_of_made(_in_order(gather(_concatenate(made))), samples, scoring)
    return metrics


def _concatenate(rows: list[Samples]) -> Samples:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _in_order(ranks: list[Samples]) -> Samples:
    """All ranks' rows by position, which takes the number of ranks out of every sum."""
    rows = _concatenate([rank for rank in ranks if rank])
    if not rows:
        return {"position": torch.empty(0)}
    order = rows["position"].argsort()
    return {name: values[order] for name, values in rows.items()}


def _parts(objective: Objective, batch: Batch) -> Iterator[Batch]:
    """A batch in parts whose logits fit into memory: those of 64 rows of 2048 tokens would be 16 GB.

    Draws are made by a row's position, so it does not matter what is measured together.
    """
    seq_len = batch["input_ids"].shape[1]
    rows = rows_at_a_time(seq_len, objective.model.vocab_size)
    names = ("input_ids", "attention_mask", "latent", "position")
    for part in zip(*(batch[name].split(rows) for name in names), strict=True):
        yield dict(zip(names, part, strict=True))


def _lent(objective: Objective, batch: Batch) -> Samples:
    """What samples lend to others when latents and texts are shuffled, padded to one length."""
    missing = objective.max_seq_len - batch["input_ids"].shape[1]
    rows = {
        "position": batch["position"],
        "tokens": F.pad(batch["input_ids"], (0, missing)),
        "mask": F.pad(batch["attention_mask"].bool(), (0, missing)),
        "latent": batch["latent"].float(),
    }
    return {name: values.cpu() for name, values in rows.items()}


def _made_texts(objective: Objective, batch: Batch, seed: int, scoring: TextScoring) -> Samples:
    """Texts of a batch made of its true latents (l2t) and of those predicted from its texts (t2l2t).

    Tokens [n, max_seq_len] each, for the n rows among the first scoring.count.
    """
    device = next(objective.parameters()).device
    chosen = batch["position"].cpu() < scoring.count
    position = batch["position"].cpu()[chosen]
    width = objective.max_seq_len
    if not len(position):
        return {"position": position, **{name: torch.empty(0, width, dtype=torch.int64) for name in ("l2t", "t2l2t")}}
    tokens, mask, z = (batch[name].cpu()[chosen].to(device) for name in ("input_ids", "attention_mask", "latent"))
    mask = mask.bool()
    predicted = encode(objective, tokens, mask, scoring.decoding, seed)
    made = {
        name: decode(objective, latents, mask, scoring.decoding, seed, position)
        for name, latents in (("l2t", z.float()), ("t2l2t", predicted))
    }
    missing = width - tokens.shape[1]
    return {"position": position, **{name: F.pad(words, (0, missing)).cpu() for name, words in made.items()}}


def _measure(objective: Objective, batch: Batch, samples: Samples, seed: int, scoring: TextScoring) -> Samples:
    """Rows of one batch: sums over the real tokens of each text, and the predicted latents."""
    device = next(objective.parameters()).device
    position = batch["position"].cpu()  # draws are made on the CPU, the same for every device
    count = samples["position"].numel()
    noise = StepNoise(seed, 0, position, count)
    tokens, mask, z = (batch[name].to(device) for name in ("input_ids", "attention_mask", "latent"))
    own = Inputs(tokens, mask.bool(), z.float(), samples["mask"].sum(1).to(device), noise)
    eps = noise.normal("evaluation", z.shape[1]).to(device)

    # A gain is measured against another sample's latent or text, half the evaluation set away.
    other = (position + count // 2) % count
    other_mask = samples["mask"][other]
    longest = int(other_mask.sum(1).max())
    other_text = dataclasses.replace(
        own,
        tokens=samples["tokens"][other, :longest].to(device),
        mask=other_mask[:, :longest].to(device),
    )

    def predicted(texts: Inputs, tokens: Tensor, t: float) -> Tensor:
        """Clean latents [B, D] predicted from tokens [B, S] and the own latents with noise of timestep t."""
        timesteps = own.timesteps(t)
        z_t, _ = objective.schedule.add_noise(z, timesteps, eps)
        return objective.schedule.predict_x0(z_t, timesteps, objective.t2l(texts, tokens, z_t, timesteps))

    logits = objective.l2t(own, own.latent)
    x0 = predicted(own, tokens, 1.0)
    rows = {
        "l2t": _text_scores(logits, own, scoring),
        "l2t_shuffled": _text_scores(objective.l2t(own, samples["latent"][other].to(device)), own, scoring),
        "t2l2t": _text_scores(objective.l2t(own, x0), own, scoring),
        "x0": x0,
        "x0_shuffled": predicted(other_text, other_text.tokens, 1.0),
        "x0_cycle": predicted(own, logits.argmax(-1), 1.0),
        **{f"x0@{t}": predicted(own, tokens, t) for t in NOISY_T},
    }
    return {"position": position, **{name: values.cpu() for name, values in rows.items()}}


def _text_scores(logits: Tensor, texts: Inputs, scoring: TextScoring) -> Tensor:
    """For each text the sums over its real tokens of cross-entropy, correct words and entropy: [B, 3] float64."""
    tokens, mask = texts.tokens, texts.mask
    log_p = logits.float().log_softmax(-1)
    cross_entropy = -log_p.gather(-1, tokens[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    correct = (logits.argmax(-1) == tokens) & scoring.words(tokens, mask)
    columns = torch.stack([cross_entropy, correct.float(), entropy], dim=-1)
    return columns.masked_fill(~mask[..., None], 0).double().sum(1)


def participation_ratio(x: Tensor) -> float:
    """Number of directions over which the variance of rows [N, D] is spread, in [1, D]; 0 without any variance.

    It is trace(C)^2 / trace(C^2) of the rows' covariance C (Gao et al. 2017).
    """
    centred = x.double() - x.double().mean(0)
    covariance = centred.T @ centred
    trace = float(covariance.trace())
    return trace**2 / float((covariance**2).sum()) if trace else 0.0


def retrieval(similarity: Tensor, k: int) -> float:
    """How often the own column is among the k largest of its row, of similarities [N, N].

    Columns that are equal come in random order: a tie counts as the chance of being among the k. NaN where a similarity
    is: it compares as neither larger nor smaller, and a broken model would find everything.
    """
    if similarity.isnan().any():
        return float("nan")
    own = similarity.diagonal()[:, None]
    larger, equal = (similarity > own).sum(1), (similarity == own).sum(1)
    return float(((k - larger).double() / equal).clamp(0, 1).mean())


def _summary_of_made(made: Samples, samples: Samples, scoring: TextScoring) -> dict[str, float]:
    """The metrics of the texts that were made."""
    count = made["position"].numel()
    texts = {name: made[name] for name in ("l2t", "t2l2t")}
    return scores_of_generated(texts, samples["tokens"][:count], samples["mask"][:count], scoring)


def _summary(rows: Samples, samples: Samples, scoring: TextScoring) -> dict[str, float]:
    """The metrics from all rows in order."""
    z = samples["latent"].double()
    tokens = int(samples["mask"].sum())
    words = scoring.words(samples["tokens"], samples["mask"])
    x0 = {name: values.double() for name, values in rows.items() if name.startswith("x0")}

    def per_token(name: str, column: int) -> float:
        return float(rows[name][:, column].sum()) / tokens

    def accuracy(name: str) -> float:
        return float(rows[name][:, 1].sum()) / max(1, int(words.sum()))

    def mse(name: str) -> float:
        return float(F.mse_loss(x0[name], z))

    def cosine(name: str) -> float:
        return float(F.cosine_similarity(x0[name], z, dim=-1).mean())

    metrics = {
        "l2t/ce": per_token("l2t", 0),
        "l2t/token_acc": accuracy("l2t"),
        "l2t/latent_gain": per_token("l2t_shuffled", 0) - per_token("l2t", 0),
        "t2l/text_gain": mse("x0_shuffled") - mse("x0"),
        "t2l2t/ce": per_token("t2l2t", 0),
        "t2l2t/token_acc": accuracy("t2l2t"),
        "l2t2l/cos": cosine("x0_cycle"),
    }
    for suffix in ("", *(f"@{t}" for t in NOISY_T)):
        x = x0[f"x0{suffix}"]
        metrics |= {
            f"t2l/x0_cos{suffix}": cosine(f"x0{suffix}"),
            f"t2l/x0_mse{suffix}": mse(f"x0{suffix}"),
            f"t2l/x0_norm_ratio{suffix}": float(x.norm(dim=-1).mean() / z.norm(dim=-1).mean()),
        }
    similarity = F.normalize(x0["x0_cycle"], dim=-1) @ F.normalize(z, dim=-1).T
    metrics |= {f"l2t2l/retrieval_at_{k}": retrieval(similarity, k) for k in (1, 5, 10)}
    metrics["latent/active_dims"] = participation_ratio(x0["x0"])
    metrics["latent/active_dims_data"] = participation_ratio(z)
    metrics["pseudo/entropy"] = per_token("l2t", 2)
    metrics["text/most_frequent_token_acc"] = most_frequent_accuracy(samples["tokens"], words)
    metrics["text/most_frequent_at_place_acc"] = most_frequent_at_place_accuracy(
        samples["tokens"], samples["mask"], words
    )
    return metrics | {"samples": float(z.shape[0]), "tokens": float(tokens)}

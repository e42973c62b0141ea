"""How well both directions work on held-out samples: fixed noise, per token, padding excluded.

Every figure is computed from rows, one per sample, that are gathered and put in order first. So neither the batch size nor the
number of ranks changes what is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from job.errors import UserError
from job.objective.noise import StepNoise
from job.objective.trainer import Batch, Step, Trainer

Rows = dict[str, Tensor]
Gather = Callable[[Rows], list[Rows]]
NOISY_T = (0.25, 0.5, 0.9)  # besides t = 1, the start of generation
CHUNK_ELEMENTS = 1 << 26  # of vocabulary distributions made float32 at a time


def one_rank(rows: Rows) -> list[Rows]:
    """The gathered rows of a single process."""
    return [rows]


@torch.no_grad()
def evaluate(
    trainer: Trainer,
    batches: Iterable[Batch],
    seed: int,
    gather: Gather = one_rank,
    between: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Metrics by name (see `job.metric_names.EVALUATION`) of this rank's evaluation batches; `position` is the place in the evaluation set.

    `gather` returns every rank's rows (a dict of CPU tensors [n, ...]; empty for a rank without batches), and all ranks return the
    same metrics. `between` is called before each batch, equally often on every rank, and may raise to stop.
    Raises UserError for fewer than two samples, since nothing could be shuffled then.
    """
    batches = list(batches)
    samples = _in_order(gather(_concatenate([_samples(trainer, batch) for batch in batches])))
    if samples["position"].numel() < 2:
        raise UserError(
            f"evaluation needs at least 2 samples, found {samples['position'].numel()}; prepare a larger validation split"
        )
    rounds = max(int(count["batches"]) for count in gather({"batches": torch.tensor(len(batches))}))
    rows = []
    was_training = trainer.training
    trainer.eval()
    try:
        for number in range(rounds):
            between()
            if number < len(batches):
                rows.append(_measure(trainer, batches[number], samples, seed))
    finally:
        trainer.train(was_training)
    return _summary(_in_order(gather(_concatenate(rows))), samples)


def _concatenate(rows: list[Rows]) -> Rows:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _in_order(ranks: list[Rows]) -> Rows:
    rows = _concatenate([rank for rank in ranks if rank])
    order = rows["position"].argsort() if rows else torch.empty(0)
    return {name: values[order] for name, values in rows.items()} or {"position": order}


def _samples(trainer: Trainer, batch: Batch) -> Rows:
    """What a sample lends to others when latents and texts are shuffled, padded to one length."""
    missing = trainer.max_seq_len - batch["input_ids"].shape[1]
    rows = {
        "position": batch["position"],
        "tokens": F.pad(batch["input_ids"], (0, missing)),
        "mask": F.pad(batch["attention_mask"].bool(), (0, missing)),
        "latent": batch["latent"].float(),
    }
    return {name: values.cpu() for name, values in rows.items()}


def _measure(trainer: Trainer, batch: Batch, samples: Rows, seed: int) -> Rows:
    """Rows of one batch: sums over the real tokens of each text, and the predicted latents."""
    device = next(trainer.parameters()).device
    position = batch["position"].cpu()  # draws are made on the CPU, the same for every device
    count = samples["position"].numel()
    tokens, mask, z = (batch[name].to(device) for name in ("input_ids", "attention_mask", "latent"))
    noise = StepNoise(seed, 0, position, count)
    s = Step(tokens, mask.bool(), z.float(), samples["mask"].sum(1).to(device), noise)
    eps = noise.normal("evaluation", z.shape[1]).to(device)

    def predict_x0(step: Step, tokens: Tensor, value: float) -> Tensor:
        t = s.timesteps(value)
        z_t, _ = trainer.schedule.add_noise(z, t, eps)
        return trainer.schedule.predict_x0(z_t, t, trainer.t2l(step, tokens, z_t, t))

    other = (position + count // 2) % count  # every sample gets another one's latent and text
    other_mask = samples["mask"][other]
    longest = int(other_mask.sum(1).max())
    other_step = dataclasses.replace(
        s, tokens=samples["tokens"][other, :longest].to(device), mask=other_mask[:, :longest].to(device)
    )

    logits = trainer.l2t(s, s.latent)
    pseudo = logits.argmax(-1)
    x0 = predict_x0(s, tokens, 1.0)
    rows = {
        "l2t": _text_scores(logits, s),
        "l2t_shuffled": _text_scores(trainer.l2t(s, samples["latent"][other].to(device)), s),
        "t2l2t": _text_scores(trainer.l2t(s, x0), s),
        "x0": x0,
        "x0_shuffled": predict_x0(other_step, other_step.tokens, 1.0),
        "x0_cycle": predict_x0(s, pseudo, 1.0),
        **{f"x0@{t}": predict_x0(s, tokens, t) for t in NOISY_T},
    }
    return {"position": position, **{name: values.cpu() for name, values in rows.items()}}


def _text_scores(logits: Tensor, s: Step) -> Tensor:
    """For each text the sums of cross-entropy, correct tokens and entropy over its real tokens: [B, 3] float64."""
    scores = []
    rows = max(1, CHUNK_ELEMENTS // logits[0].numel())
    for part, tokens, mask in zip(logits.split(rows), s.tokens.split(rows), s.mask.split(rows), strict=True):
        log_p = part.float().log_softmax(-1)
        cross_entropy = -log_p.gather(-1, tokens[..., None]).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        columns = torch.stack([cross_entropy, (part.argmax(-1) == tokens).float(), entropy], dim=-1)
        scores.append(columns.masked_fill(~mask[..., None], 0).double().sum(1))
    return torch.cat(scores)


def participation_ratio(x: Tensor) -> float:
    """Number of directions over which the variance of rows [N, D] is spread: trace(C)^2 / trace(C^2) of their covariance C, in [1, D];
    0 without any variance."""
    centred = x.double() - x.double().mean(0)
    covariance = centred.T @ centred
    trace = float(covariance.trace())
    return trace**2 / float((covariance**2).sum()) if trace else 0.0


def _summary(rows: Rows, samples: Rows) -> dict[str, float]:
    """The metrics from all rows in order."""
    z = samples["latent"].double()
    real_tokens = samples["tokens"][samples["mask"]]
    tokens = real_tokens.numel()
    x0 = {name: values.double() for name, values in rows.items() if name.startswith("x0")}

    def per_token(name: str, column: int) -> float:
        return float(rows[name][:, column].sum()) / tokens

    def mse(name: str) -> float:
        return float(F.mse_loss(x0[name], z))

    def cosine(name: str) -> float:
        return float(F.cosine_similarity(x0[name], z, dim=-1).mean())

    metrics = {
        "l2t/ce": per_token("l2t", 0),
        "l2t/token_acc": per_token("l2t", 1),
        "l2t/latent_gain": per_token("l2t_shuffled", 0) - per_token("l2t", 0),
        "t2l/text_gain": mse("x0_shuffled") - mse("x0"),
        "t2l2t/ce": per_token("t2l2t", 0),
        "t2l2t/token_acc": per_token("t2l2t", 1),
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
    nearest = (similarity == similarity.max(1, keepdim=True).values).double()
    metrics["l2t2l/retrieval_at_1"] = float(
        (nearest.diagonal() / nearest.sum(1)).mean()
    )  # a tie counts as the chance of drawing the right one
    metrics["latent/active_dims"] = participation_ratio(x0["x0"])
    metrics["latent/active_dims_data"] = participation_ratio(z)
    metrics["pseudo/entropy"] = per_token("l2t", 2)
    metrics["text/most_frequent_token_acc"] = float(real_tokens.bincount().max()) / tokens
    return metrics | {"samples": float(z.shape[0]), "tokens": float(tokens)}

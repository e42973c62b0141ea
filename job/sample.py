"""`python -m job.sample`: texts through a trained model and back, decoded latents, and texts from noise."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from job.command import guarded
from job.config import Config
from job.data.loader import BatchFormat, evaluation_batches
from job.data.shards import Dataset
from job.data.tokenizer import TextTokenizer
from job.errors import UsageError, UserError
from job.files import write_text
from job.inference import Trained, choose_device, load_trained, tokenizer_of
from job.objective.objective import Objective
from job.objective.sampling import generate
from job.runtime.precision import autocast


class RoundTrip(NamedTuple):
    """A text, what is decoded from its true latent (None where that is unknown), and from the latent predicted from it."""

    text: str
    from_latent: str | None
    from_text: str


def decode(tokenizer: TextTokenizer | None, rows: Tensor, mask: Tensor) -> list[str]:
    """Texts of token rows [B, S]; the token ids themselves without a tokenizer."""
    kept = [row[real].tolist() for row, real in zip(rows.cpu(), mask.cpu(), strict=True)]
    return [tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids)) for ids in kept]


def through(trainer: Objective, tokens: Tensor, mask: Tensor, steps: int, temperature: float, seed: int) -> Tensor:
    """Text -> latent -> text: tokens [B, S] of the same lengths."""
    _, latent = generate(trainer, mask, tokens=tokens, steps=steps, seed=seed)
    return generate(trainer, mask, latent=latent, steps=steps, temperature=temperature, seed=seed)[0]


def round_trips(
    trainer: Objective,
    dataset: Dataset,
    config: Config,
    count: int,
    steps: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[RoundTrip]:
    """The first `count` texts of a dataset, decoded from their latents and from the latents predicted from them."""
    device, was_training = next(trainer.parameters()).device, trainer.training
    trainer.eval()
    trips: list[RoundTrip] = []
    tokenizer = tokenizer_of(dataset)
    for batch in evaluation_batches(
        dataset, BatchFormat.of(config), num_samples=count, batch_size=config.training.eval_batch_size
    ):
        tokens, mask, latent = (batch[name].to(device) for name in ("input_ids", "attention_mask", "latent"))
        decoded, _ = generate(trainer, mask, latent=latent, steps=steps, temperature=temperature, seed=seed)
        rows = (tokens, decoded, through(trainer, tokens, mask, steps, temperature, seed))
        trips += [RoundTrip(*texts) for texts in zip(*(decode(tokenizer, row, mask) for row in rows), strict=True)]
    trainer.train(was_training)
    return trips


def listing(trips: Iterable[RoundTrip]) -> str:
    """Round trips as text, a paragraph each."""
    return "\n".join(
        f"text   {trip.text}\n"
        + (f"L2T    {trip.from_latent}\n" if trip.from_latent is not None else "")
        + f"T2L2T  {trip.from_text}\n"
        for trip in trips
    )


def write_samples(path: Path, trips: Iterable[RoundTrip]) -> None:
    """Write round trips to a file, whole or not at all."""
    write_text(path, listing(trips))


def given_texts(
    trainer: Objective, trained: Trained, texts: Sequence[str], options: argparse.Namespace
) -> list[RoundTrip]:
    """Round trips of texts of the user's own."""
    if trained.tokenizer is None:
        raise UserError(
            "--text needs a tokenizer, and the data of this run came without one; leave --text out to see held-out samples"
        )
    rows = trained.tokenizer.encode(texts)
    for text, row in zip(texts, rows, strict=True):
        if not 0 < len(row) <= trainer.max_seq_len:
            raise UserError(f"--text {text[:40]!r}: {len(row)} tokens; this model takes 1 to {trainer.max_seq_len}")
    device, longest = next(trainer.parameters()).device, max(map(len, rows))
    tokens = torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row))) for row in rows])).to(device)
    mask = torch.arange(longest, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
    decoded = through(trainer, tokens, mask, options.steps, options.temperature, options.seed)
    return [
        RoundTrip(text, None, back) for text, back in zip(texts, decode(trained.tokenizer, decoded, mask), strict=True)
    ]


def from_noise(trainer: Objective, trained: Trained, options: argparse.Namespace) -> list[str]:
    """Texts made together with their latents from noise, of the lengths of held-out texts."""
    if trained.config.loss.loss_type not in ("unconditional", "random", "sequential"):
        raise UserError(
            f"--unconditional: a run with loss.loss_type={trained.config.loss.loss_type} was never trained on noise in both; "
            "train with loss=unconditional or loss=random"
        )
    dataset, device = trained.held_out(), next(trainer.parameters()).device
    lengths = torch.from_numpy(dataset.lengths(np.arange(options.count) % len(dataset))).to(device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    words, _ = generate(trainer, mask, steps=options.steps, temperature=options.temperature, seed=options.seed)
    return decode(trained.tokenizer, words, mask)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m job.sample",
        description="Round trips through a trained model: text, L2T (decoded from the text's own "
        "latent), T2L2T (decoded from the latent predicted from the text).",
    )
    p.add_argument("path", type=Path, help="run directory, checkpoint, or exported model")
    p.add_argument(
        "--text", action="append", help="a text of your own (may be given several times) instead of held-out ones"
    )
    p.add_argument(
        "--unconditional",
        action="store_true",
        help="texts from noise, for models trained with loss=unconditional, random or sequential",
    )
    p.add_argument("--count", type=int, default=8, help="number of samples (8)")
    p.add_argument(
        "--steps",
        type=int,
        help="passes per direction (1, the one-shot form that cycle_vae trains; 32 with --unconditional)",
    )
    p.add_argument("--temperature", type=float, help="0 takes the likeliest tokens (0; 1 with --unconditional)")
    p.add_argument("--seed", type=int, default=0, help="seed of the noise (0)")
    p.add_argument("--data", type=Path, help="prepared data directory, if not the run's own")
    p.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="take the moving average of the weights (if there is one, as training does)",
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    if options.unconditional and options.text:
        raise UsageError("--unconditional makes texts from noise and takes no --text; leave one of them out")
    options.steps = options.steps if options.steps is not None else (32 if options.unconditional else 1)
    options.temperature = options.temperature if options.temperature is not None else float(options.unconditional)
    for name, low in (("count", 1), ("steps", 1), ("temperature", 0), ("seed", 0)):
        if getattr(options, name) < low:
            raise UsageError(f"--{name} {getattr(options, name)}: give at least {low}")
    trained, device = load_trained(options.path, options.data, options.ema), choose_device(options.device)
    trainer = trained.objective(device)
    with autocast(trained.config.training.dtype, device):
        if options.unconditional:
            print("\n".join(from_noise(trainer, trained, options)))
        elif options.text:
            print(listing(given_texts(trainer, trained, options.text, options)))
        else:
            print(
                listing(
                    round_trips(
                        trainer,
                        trained.held_out(),
                        trained.config,
                        options.count,
                        options.steps,
                        options.temperature,
                        options.seed,
                    )
                )
            )


if __name__ == "__main__":
    sys.exit(guarded(main))

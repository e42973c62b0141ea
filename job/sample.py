"""`python -m job.sample`: texts through a trained model and back, decoded latents, and texts from noise."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from job.api import Model
from job.arguments import add_device_option, add_model_options, at_least
from job.command import guarded
from job.errors import UsageError, UserError
from job.objective.sampling import generate
from job.round_trips import (
    ONE_SHOT,
    Decoding,
    RoundTrip,
    as_paragraphs,
    as_texts,
    length_mask,
    round_trips,
)
from job.runtime.precision import autocast
from job.trained import choose_device, load_trained

TRAINED_ON_NOISE = ("unconditional", "random", "sequential")  # values of loss.loss_type


def given_texts(model: Model, texts: Sequence[str], decoding: Decoding) -> list[RoundTrip]:
    """Round trips of texts of the user's own."""
    decoded = model.round_trip(
        texts, steps=decoding.steps, temperature=decoding.temperature, seed=decoding.seed, batch_size=len(texts)
    )
    return [RoundTrip(text, None, back) for text, back in zip(texts, decoded, strict=True)]


def held_out_texts(model: Model, count: int, decoding: Decoding) -> list[RoundTrip]:
    """Round trips of the first held-out texts."""
    trained, batch_size = model.trained, model.config.training.eval_batch_size
    with autocast(model.dtype, model.device):
        return round_trips(model.objective, trained.held_out, trained.format, count, batch_size, decoding)


def texts_from_noise(model: Model, count: int, decoding: Decoding) -> list[str]:
    """Texts made together with their latents from noise, of the lengths of held-out texts."""
    trained, loss_type = model.trained, model.config.loss.loss_type
    if loss_type not in TRAINED_ON_NOISE:
        raise UserError(
            f"--unconditional: a run with loss.loss_type={loss_type} was never trained on noise in both; "
            "train with loss=unconditional or loss=random"
        )
    dataset = trained.held_out
    # The model does not choose lengths, so they are those of real texts, from the start again where there are too few.
    lengths = torch.from_numpy(dataset.lengths(np.arange(count) % len(dataset)))
    mask = length_mask(lengths).to(model.device)
    with autocast(model.dtype, model.device):
        tokens, _ = generate(
            model.objective, mask, steps=decoding.steps, temperature=decoding.temperature, seed=decoding.seed
        )
    return as_texts(trained.tokenizer, tokens, mask)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.sample",
        description="Round trips through a trained model: text, L2T (decoded from the text's own latent), "
        "T2L2T (decoded from the latent predicted from the text).",
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
    p.add_argument("--count", type=int, action=at_least(1), default=8, help="number of samples (8)")
    p.add_argument(
        "--steps",
        type=int,
        action=at_least(1),
        help="passes per direction (1, the one-shot form that cycle_vae trains; 32 with --unconditional)",
    )
    p.add_argument(
        "--temperature",
        type=float,
        action=at_least(0),
        help="0 takes the likeliest tokens (0; 1 with --unconditional)",
    )
    p.add_argument("--seed", type=int, action=at_least(0), default=0, help="seed of the noise (0)")
    add_model_options(p)
    add_device_option(p)
    return p


def decoding_of(options: argparse.Namespace) -> Decoding:
    """What the command line says of decoding.

    From noise one pass is not enough: it would draw every token without knowing of the others.
    """
    default = Decoding(steps=32, temperature=1.0) if options.unconditional else ONE_SHOT
    return Decoding(
        steps=default.steps if options.steps is None else options.steps,
        temperature=default.temperature if options.temperature is None else options.temperature,
        seed=options.seed,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    if options.unconditional and options.text:
        raise UsageError("--unconditional makes texts from noise and takes no --text; leave one of them out")
    decoding = decoding_of(options)
    trained = load_trained(options.path, options.data, options.ema)
    model = Model(trained, choose_device(options.device), trained.config.training.dtype)
    if options.unconditional:
        print("\n".join(texts_from_noise(model, options.count, decoding)))
    elif options.text:
        print(as_paragraphs(given_texts(model, options.text, decoding)))
    else:
        print(as_paragraphs(held_out_texts(model, options.count, decoding)))


if __name__ == "__main__":
    sys.exit(guarded(main))

"""`python -m job.sample`: texts through a trained model and back, decoded latents, and texts from noise."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import einx  # noqa: F401  # before torch: job.model.backbone says why
import numpy as np
import torch

from job.api import DecodingWarning, Model
from job.arguments import add_decoding_options, add_device_option, add_model_options, at_least, given_decoding
from job.command import guarded
from job.config import DecodingConfig
from job.config_checks import check_decoding
from job.errors import UsageError, UserError
from job.objective.sampling import ONE_PASS, generate
from job.round_trips import RoundTrip, as_paragraphs, as_texts, length_mask, round_trips
from job.runtime.precision import autocast
from job.trained import choose_device, load_trained

COUNT = 8  # samples, where --count does not say it
TRAINED_ON_NOISE = ("unconditional", "random", "sequential")  # values of loss.loss_type
FROM_NOISE = {"steps": 32, "temperature": 1.0}  # in one pass every token would be drawn without knowing of the others


def given_texts(model: Model, texts: Sequence[str], seed: int, decoding: dict[str, Any]) -> list[RoundTrip]:
    """Round trips of texts of the user's own."""
    decoded = model.round_trip(texts, seed=seed, batch_size=len(texts), **decoding)
    return [RoundTrip(text, None, back) for text, back in zip(texts, decoded, strict=True)]


def held_out_texts(model: Model, count: int, seed: int, decoding: DecodingConfig) -> list[RoundTrip]:
    """Round trips of the first held-out texts."""
    trained, batch_size = model.trained, model.config.training.eval_batch_size
    with autocast(model.dtype, model.device):
        return round_trips(model.objective, trained.held_out, trained.format, count, batch_size, decoding, seed)


def texts_from_noise(model: Model, count: int, seed: int, decoding: DecodingConfig) -> list[str]:
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
        tokens, _ = generate(model.objective, mask, decoding=decoding, seed=seed)
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
    p.add_argument("--count", type=int, action=at_least(1), help=f"number of samples ({COUNT})")
    p.add_argument("--seed", type=int, action=at_least(0), default=0, help="seed of the noise (0)")
    add_decoding_options(p)
    add_model_options(p)
    add_device_option(p)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    given = given_decoding(options)
    if options.unconditional and options.text:
        raise UsageError("--unconditional makes texts from noise and takes no --text; leave one of them out")
    if options.text and options.count:
        raise UsageError(f"--count {options.count} has no effect with --text: each text is one sample; leave it out")
    count = options.count or COUNT
    if options.unconditional and (cycle := {"candidates", "corrections"} & given.keys()):
        raise UsageError(f"--{min(cycle)} compares a text with a latent that is wanted; --unconditional has none")
    trained = load_trained(options.path, options.data, options.ema, options.cache_dir)
    model = Model(trained, choose_device(options.device), trained.config.training.dtype)
    if options.unconditional:
        decoding = dataclasses.replace(ONE_PASS, **(FROM_NOISE | given))
    else:
        decoding = dataclasses.replace(trained.config.decoding, **given)
    for warning in check_decoding(trained.config, decoding):
        print(f"warning: {warning}", file=sys.stderr)
    warnings.simplefilter("ignore", DecodingWarning)  # the model's own words for the same
    if options.unconditional:
        print("\n".join(texts_from_noise(model, count, options.seed, decoding)))
    elif options.text:
        print(as_paragraphs(given_texts(model, options.text, options.seed, given)))
    else:
        print(as_paragraphs(held_out_texts(model, count, options.seed, decoding)))


if __name__ == "__main__":
    sys.exit(guarded(main))

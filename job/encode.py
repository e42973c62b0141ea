"""`cyclevae encode MODEL texts.txt latents.npy`: the latents that a model predicts from texts, from file to file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from job.api import load
from job.arguments import add_device_option, add_inference_options, add_model_options, at_least
from job.command import guarded
from job.errors import UserError
from job.text_files import read_texts, refuse_output, refuse_same, say_written, write_latents, write_lengths


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.encode",
        description="Latents of texts, in the units of the encoder that made the model's training data.",
    )
    p.add_argument("path", type=Path, help="run directory, checkpoint, or exported model")
    p.add_argument("texts", help="a text a line, or .jsonl; - reads lines from standard input")
    p.add_argument("latents", help="file to write: .npy, float32 [N, D], or .jsonl; - prints .jsonl")
    p.add_argument("--text-key", default="text", help="key of the text in .jsonl (text)")
    p.add_argument("--truncate", action="store_true", help="cut texts that have too many tokens, instead of failing")
    p.add_argument("--lengths", metavar="FILE", help="also write the tokens of each text, for `decode --lengths FILE`")
    p.add_argument("--steps", type=int, action=at_least(1), help="passes (as the run's decoding.latent_steps says)")
    add_inference_options(p)
    add_model_options(p)
    add_device_option(p)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    refuse_output(options.latents, (".npy", ".jsonl"))
    if options.lengths:
        refuse_output(options.lengths, ())
    refuse_same([options.texts], [options.latents, *([options.lengths] if options.lengths else [])])
    texts = read_texts(options.texts, options.text_key)
    if not texts:
        raise UserError(f"{options.texts}: no texts")
    model = load(
        options.path, device=options.device, average=options.ema, data=options.data, cache_dir=options.cache_dir
    )
    latents = model.encode(
        texts,
        truncate=options.truncate,
        steps=options.steps,
        seed=options.seed,
        batch_size=options.batch_size,
        progress=sys.stderr.isatty(),
    )
    lengths = [min(count, model.max_length) for count in model.token_counts(texts)]
    write_latents(options.latents, latents, lengths)
    if options.lengths:
        write_lengths(options.lengths, lengths)
    say_written(f"{len(texts)} texts -> latents of {model.latent_dim} dimensions", options.latents)


if __name__ == "__main__":
    sys.exit(guarded(main, output_is_result=False))  # a result that cannot be written is an error of its own

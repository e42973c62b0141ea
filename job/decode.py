"""`cyclevae decode MODEL latents.npy texts.txt`: the texts that a model decodes from latents, from file to file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from job.api import load
from job.arguments import (
    add_decoding_options,
    add_device_option,
    add_inference_options,
    add_model_options,
    given_decoding,
)
from job.command import guarded
from job.text_files import read_latents, read_lengths, refuse_output, refuse_same, say_written, write_texts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.decode",
        description="Texts of latents, which are in the units of the encoder that made the model's training data.",
    )
    p.add_argument("path", type=Path, help="run directory, checkpoint, or exported model")
    p.add_argument(
        "latents", help="[N, D] in .npy, or .jsonl as `encode` writes it; - reads either from standard input"
    )
    p.add_argument("texts", help="file to write: a text a line (.txt), or .jsonl; - prints lines")
    p.add_argument(
        "--lengths",
        metavar="N|FILE",
        help="tokens of each text: a number for all, or a file with one a line or .npy "
        "(what a .jsonl says, else as long as texts with such a latent are likely to be)",
    )
    add_decoding_options(p)
    add_inference_options(p)
    add_model_options(p)
    add_device_option(p)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    refuse_output(options.texts, (".txt", ".jsonl"))
    refuse_same([options.latents, *([options.lengths] if options.lengths else [])], [options.texts])
    latents, said_lengths = read_latents(options.latents)
    lengths = read_lengths(options.lengths) if options.lengths else said_lengths
    model = load(
        options.path, device=options.device, average=options.ema, data=options.data, cache_dir=options.cache_dir
    )
    texts = model.decode(
        latents,
        lengths,
        seed=options.seed,
        batch_size=options.batch_size,
        progress=sys.stderr.isatty(),
        **given_decoding(options),
    )
    write_texts(options.texts, texts)
    say_written(f"{len(texts)} latents -> texts", options.texts)


if __name__ == "__main__":
    sys.exit(guarded(main, output_is_result=False))  # a result that cannot be written is an error of its own

"""`python -m job.convert`: LGDLM's data and checkpoints into this project's files, and a trained model out of its run."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from job.command import guarded
from job.config import to_dict
from job.data.tokenizer import TOKENIZER_FILE
from job.errors import UsageError, UserError
from job.files import write_json, write_text, write_whole
from job.inference import CONFIG_FILE, WEIGHTS_FILE, load_trained
from job.lgdlm import data as lgdlm
from job.lgdlm.checkpoint import check_generation, generation, read_checkpoint
from job.model.weights import describe, overrides, serialize


def data(options: argparse.Namespace) -> None:
    """LGDLM's token and latent directories to shards."""
    if not 0 < options.validation_fraction < 1:
        raise UsageError(f"--validation-fraction {options.validation_fraction}: give a value between 0 and 1")
    print(
        lgdlm.convert(
            options.token_dir,
            options.latent_dir,
            options.out,
            tokenizer=options.tokenizer,
            mask_token_id=options.mask_token_id,
            pad_token_id=options.pad_token_id,
            vocab_size=options.vocab_size,
            validation_fraction=options.validation_fraction,
            skip_bad=options.skip_bad,
        )
    )


def save_weights(path: Path, weights: Mapping[str, Tensor], **metadata: str) -> None:
    """Write a weight file, whole or not at all."""
    content = serialize(weights, **metadata)
    write_whole(path, lambda file: file.write(content))


def checkpoint(options: argparse.Namespace) -> None:
    """An LGDLM checkpoint to a weight file."""
    if options.out.is_dir():
        raise UserError(f"{options.out} is a directory; name a file, such as {options.out / 'lgdlm.safetensors'}")
    found = read_checkpoint(options.source)
    check_generation(found.path, found.weights)
    try:
        settings = describe(found.weights)
    except UserError as error:
        raise UserError(f"{found.path}: {error}") from error
    save_weights(
        options.out, found.weights, source=found.path.name, step=str(found.step), mmdit=generation(found.weights)
    )
    print(
        f"{options.out}: step {found.step} of {found.path}, {sum(t.numel() for t in found.weights.values()) / 1e6:.1f} M parameters, "
        f"keys of mmdit {generation(found.weights)}\nuse it with: training.init_from={options.out} compat=lgdlm {overrides(settings)}"
    )


def export(options: argparse.Namespace) -> None:
    """The model of a run, or of one of its checkpoints, to a directory for inference."""
    if options.out.exists():
        raise UserError(f"{options.out}: exists already; give another name or delete it")
    trained = load_trained(options.path, options.data, options.ema)
    config = replace(
        trained.config,
        model=replace(
            trained.config.model,
            vocab_size=trained.weights["text_head.weight"].shape[0],
            latent_dim=trained.weights["latent_head.3.weight"].shape[0],
        ),
    )
    partial = options.out.with_name(f"{options.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_weights(partial / WEIGHTS_FILE, trained.weights, step=str(trained.step))
        if trained.tokenizer:
            write_text(partial / TOKENIZER_FILE, trained.tokenizer.to_json())
        write_json(
            partial / CONFIG_FILE,
            {
                "step": trained.step,
                "averaged": trained.averaged,
                "mask_token_id": trained.mask_token_id,
                "config": to_dict(config),
            },
            indent=2,
        )
        partial.rename(options.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(
        f"{options.out}: {WEIGHTS_FILE} and {CONFIG_FILE} of step {trained.step}{', averaged weights' if trained.averaged else ''}"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m job.convert", description=__doc__)
    commands = p.add_subparsers(required=True)
    c = commands.add_parser("data", help="LGDLM's token and latent directories to shards")
    c.add_argument("token_dir", type=Path, help="directory of NAME_tokens.npz or NAME.npz")
    c.add_argument("latent_dir", type=Path, help="directory of NAME.npy")
    c.add_argument("out", type=Path, help="directory to write")
    c.add_argument("--tokenizer", type=Path, help="tokenizer.json, or a directory with it, that made the tokens")
    for name in ("mask-token-id", "pad-token-id", "vocab-size"):
        c.add_argument(f"--{name}", type=int, help="needed without --tokenizer")
    c.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        help="share of samples held out, by the hash of their tokens (0.05)",
    )
    c.add_argument("--skip-bad", action="store_true", help="leave unpaired and corrupt files out instead of failing")
    c.set_defaults(command=data)

    c = commands.add_parser("checkpoint", help="an LGDLM checkpoint to weights for training.init_from")
    c.add_argument("source", type=Path, help="checkpoint.pt, step_N.pt, or a directory with one")
    c.add_argument("out", type=Path, help="safetensors file to write")
    c.set_defaults(command=checkpoint)

    c = commands.add_parser("export", help="a trained model to model.safetensors, config.json and tokenizer.json")
    c.add_argument("path", type=Path, help="run directory or checkpoint")
    c.add_argument("out", type=Path, help="directory to write")
    c.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="take the moving average of the weights (if there is one)"
    )
    c.add_argument("--data", type=Path, help="prepared data directory, if not the run's own")
    c.set_defaults(command=export)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    options.command(options)


if __name__ == "__main__":
    sys.exit(guarded(main))

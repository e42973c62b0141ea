"""`python -m job.convert`: LGDLM's data and checkpoints to this project's files, and a trained model out of its run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from job.arguments import Fraction, add_model_options, at_least
from job.command import guarded
from job.errors import UsageError
from job.files import refuse_existing
from job.lgdlm import data as lgdlm_data
from job.runtime.processors import own_threads

# What needs torch is imported where it is used: every process that reads data imports this module.


def data(options: argparse.Namespace) -> None:
    """LGDLM's token and latent directories to shards."""
    reading = lgdlm_data.DataOptions(
        tokenizer=options.tokenizer,
        mask_token_id=options.mask_token_id,
        pad_token_id=options.pad_token_id,
        vocab_size=options.vocab_size,
        validation_fraction=options.validation_fraction,
        max_length=options.max_length,
        skip_bad=options.skip_bad,
        workers=options.workers or own_threads(1),
    )
    print(lgdlm_data.convert(options.token_dir, options.latent_dir, options.out, reading))


def checkpoint(options: argparse.Namespace) -> None:
    """An LGDLM checkpoint to a weight file."""
    from job.lgdlm import checkpoint as lgdlm_checkpoint

    print(lgdlm_checkpoint.convert(options.source, options.out))


def export(options: argparse.Namespace) -> None:
    """The model of a run, or of one of its checkpoints, to a directory for inference, and to the hub if asked."""
    from job.export import push, refuse_repository, write_export
    from job.trained import load_trained

    if not options.push_to and (options.dry_run or options.private):
        raise UsageError("--dry-run and --private have no effect without --push-to REPO; leave them out")
    if options.push_to:
        refuse_repository(options.push_to)
    refuse_existing(options.out)  # before the weights are read
    trained = load_trained(options.path, options.data, options.ema, options.cache_dir)
    write_export(trained, options.out)
    averaged = ", averaged weights" if trained.averaged else ""
    print(f"{options.out}: the model of step {trained.step}{averaged}")
    if options.push_to:
        print(push(options.out, options.push_to, private=options.private, dry_run=options.dry_run))


def parser() -> argparse.ArgumentParser:
    """The command line."""
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
        action=Fraction,
        default=0.05,
        help="share of samples held out, by the hash of their tokens (0.05)",
    )
    c.add_argument(
        "--max-length", type=int, action=at_least(1), help="leave samples of more real tokens out (none: all are kept)"
    )
    c.add_argument("--skip-bad", action="store_true", help="leave unpaired and corrupt files out instead of failing")
    c.add_argument(
        "--workers",
        type=int,
        action=at_least(1),
        metavar="N",
        help="processes that read; the result is the same for any number (as many as there are cores)",
    )
    c.set_defaults(command=data)

    c = commands.add_parser("checkpoint", help="an LGDLM checkpoint to weights for training.init_from")
    c.add_argument("source", type=Path, help="checkpoint.pt, step_N.pt, or a directory with one")
    c.add_argument("out", type=Path, help="safetensors file to write")
    c.set_defaults(command=checkpoint)

    c = commands.add_parser(
        "export",
        help="a trained model to a directory that needs neither run nor data: weights, configuration, tokenizer, "
        "latent statistics, encoder and a model card",
    )
    c.add_argument("path", type=Path, help="run directory or checkpoint")
    c.add_argument("out", type=Path, help="directory to write")
    add_model_options(c)
    c.add_argument("--push-to", metavar="REPO", help="also upload it to the Hugging Face hub, as OWNER/NAME")
    c.add_argument("--private", action="store_true", help="if the repository is new, make it private")
    c.add_argument("--dry-run", action="store_true", help="with --push-to: list what would be sent, and send nothing")
    c.set_defaults(command=export)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    options.command(options)


if __name__ == "__main__":
    sys.exit(guarded(main, output_is_result=False))

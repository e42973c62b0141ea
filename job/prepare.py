"""Turn texts into a dataset: `python -m job.prepare --out DIR [--source ...]`, or under torchrun or srun."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from job.command import guarded
from job.data import tokenizer as tokenizers
from job.data.preparation import Options, Run, finished, prepare
from job.data.shards import DatasetInfo, ShardDataset
from job.errors import UsageError, UserError
from job.runtime.launcher_variables import placement

# Options that only one choice of another reads, with the default they then have.
DEPENDENT = {
    "vocab_size": ("tokenizer", "train", 4096),
    "latent_dim": ("encoder", "lsa", 64),
    "encoder_model": ("encoder", "sentence_transformers", None),
    "truncate_dim": ("encoder", "sentence_transformers", None),
    "encoder_batch_size": ("encoder", "sentence_transformers", 32),
    "encoder_dtype": ("encoder", "sentence_transformers", "float32"),
    "encoder_device": ("encoder", "sentence_transformers", None),
}
EXAMPLES = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.prepare",
        description="Turn texts into shards of tokens and latents. Interrupted, the same command "
        "goes on; under torchrun or srun the processes divide the shards.",
    )
    p.add_argument("--out", type=Path, required=True, help="directory of the dataset")
    text = p.add_argument_group("texts")
    text.add_argument(
        "--source",
        nargs="+",
        default=["stdlib"],
        metavar="SOURCE",
        help="stdlib (sentences from the documentation of Python's own standard "
        "library; the default), files, directories or globs of .txt (a text a line), .jsonl or .parquet, hf:NAME[:CONFIG] or hf:PATH",
    )
    text.add_argument("--text-key", default="text", help="key or column of the text (%(default)s)")
    text.add_argument("--hf-split", default="train", help="split of the Hugging Face dataset (%(default)s)")
    text.add_argument("--split-sentences", action="store_true", help="every sentence of a text is a sample")
    text.add_argument("--max-samples", type=int, help="stop after this many different texts")
    text.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        help="share of the texts, chosen by content hash (%(default)s)",
    )
    text.add_argument(
        "--max-length", type=int, default=48, help="tokens of a row; longer texts are dropped and counted (%(default)s)"
    )
    text.add_argument("--shard-size", type=int, default=100_000, help="texts of a shard (%(default)s)")
    text.add_argument("--seed", type=int, default=0, help="seed of the encoder's fit (%(default)s)")
    tokens = p.add_argument_group("tokenizer")
    tokens.add_argument(
        "--tokenizer",
        default="train",
        help="tokenizer.json, its directory, a hub name, or train: byte-level BPE (%(default)s)",
    )
    tokens.add_argument("--vocab-size", type=int, help="tokens of a trained tokenizer (4096)")
    tokens.add_argument("--mask-token", help="the tokenizer's mask token, where its files do not name it")
    tokens.add_argument("--pad-token", help="the tokenizer's padding token, where its files do not name it")
    latents = p.add_argument_group("latents")
    latents.add_argument("--encoder", choices=("lsa", "sentence_transformers"), default="lsa", help="(%(default)s)")
    latents.add_argument("--latent-dim", type=int, help="lsa: dimensions (64)")
    latents.add_argument("--encoder-model", help="sentence_transformers: model name or directory")
    latents.add_argument("--truncate-dim", type=int, help="sentence_transformers: keep the first dimensions")
    latents.add_argument("--encoder-batch-size", type=int, help="sentence_transformers: texts of a batch (32)")
    latents.add_argument(
        "--encoder-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="sentence_transformers: type of the weights (float32)",
    )
    latents.add_argument(
        "--encoder-device", help="sentence_transformers: device (each process its GPU, where there is one)"
    )
    p.add_argument("--local-files-only", action="store_true", help="take tokenizer and model from the local cache")
    return p


def check(arguments: argparse.Namespace) -> None:
    """Fill in dependent defaults. UsageError for values that cannot be and options that nothing reads."""
    for name, (other, wanted, default) in DEPENDENT.items():
        flag = f"--{name.replace('_', '-')}"
        if getattr(arguments, other) == wanted:
            setattr(arguments, name, default if getattr(arguments, name) is None else getattr(arguments, name))
        elif getattr(arguments, name) is not None:
            raise UsageError(
                f"{flag} has no effect with --{other} {getattr(arguments, other)}; leave it out or give --{other} {wanted}"
            )
    if arguments.tokenizer == "train" and (arguments.mask_token or arguments.pad_token):
        raise UsageError("--mask-token and --pad-token have no effect with --tokenizer train; leave them out")
    if arguments.encoder == "sentence_transformers" and not arguments.encoder_model:
        raise UsageError("--encoder sentence_transformers needs --encoder-model NAME or DIRECTORY")
    least = {
        "vocab_size": tokenizers.MIN_VOCAB_SIZE,
        "max_samples": 2,
        "max_length": 1,
        "shard_size": 1,
        "seed": 0,
        "latent_dim": 1,
        "truncate_dim": 1,
        "encoder_batch_size": 1,
    }
    for name, low in least.items():
        if (value := getattr(arguments, name)) is not None and value < low:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give at least {low}")
    if not 0 < arguments.validation_fraction < 1:
        raise UsageError(f"--validation-fraction {arguments.validation_fraction}: give a value between 0 and 1")


def summary(out: Path, info: DatasetInfo) -> str:
    """A short account of a finished dataset."""
    rows = ShardDataset(out, "validation")
    tokenizer = tokenizers.of_dataset(out, info)
    mean = sum(info.token_counts) / info.counts["train"]
    lines = [
        f"{out}: {info.counts['train']} training and {info.counts['validation']} validation texts",
        f"  dropped      {info.options['duplicates']} duplicates, {info.options['dropped']} longer than --max-length {info.options['max_length']}",
        f"  tokens       vocabulary {info.vocab_size}, {mean:.1f} a text, at most {info.max_length}",
        f"  latents      {info.latent_dim} dimensions from {', '.join(f'{key} {value}' for key, value in info.encoder.items())}",
    ]
    if info.options["dropped"] > sum(info.counts.values()):
        lines.append(
            "  more than half of the texts were dropped: raise --max-length, or cut texts with --split-sentences"
        )
    if tokenizer:
        lines += [f"  for example  {tokenizer.decode(rows[index][0])}" for index in range(min(EXAMPLES, len(rows)))]
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Prepare what the command line says, or go on with it."""
    check(arguments)
    values, here = vars(arguments), placement(os.environ, alone=True)
    options = Options(**{name: values[name] for name in Options.__dataclass_fields__ if name in values})
    one = Run(
        arguments.out,
        options,
        here.rank,
        here.world_size,
        arguments.local_files_only,
        arguments.encoder_device,
        here.local_rank,
    )
    try:
        before = finished(one)
        info = before or prepare(one)
    except OSError as error:  # a full disk's names no file
        raise UserError(f"{error.filename or one.out}: {error.strerror or error}") from error
    if info and one.rank == 0:
        print((f"{one.out}: finished already\n" if before else "") + summary(one.out, info))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return guarded(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

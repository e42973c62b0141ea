"""The options of `python -m job.prepare`, each declared once.

A field's metadata makes its place on the command line, its help, its checks (job/prepare.py); the fields themselves are
what a preparation works with, what it writes down, and what a resumed one must have in common with the earlier one.
"""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from typing import Any

from job.data.encoders import LETTERS, LSA, MODEL2VEC, SENTENCE_TRANSFORMERS, WORDS
from job.data.sources import EMBEDDED, STDLIB
from job.data.tokenizer import MIN_VOCAB_SIZE

# Choices that other options depend on, for `read_if`: an option of these names, and its value or values.
TRAINED_TOKENIZER = ("tokenizer", "train")
WITH_LSA = ("encoder", LSA)
WITH_SENTENCE_TRANSFORMERS = ("encoder", SENTENCE_TRANSFORMERS)
WITH_A_MODEL = ("encoder", (SENTENCE_TRANSFORMERS, MODEL2VEC))

LARGEST_SEED = 2**32 - 1  # that NumPy's RandomState takes


def option(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    low: int | None = None,
    high: int | None = None,
    fraction: bool = False,
    read_if: tuple[str, str | tuple[str, ...]] | None = None,
    from_like: bool = False,
    alone: str | None = None,
    number: type[int] | type[float] = int,
) -> Any:
    """An option: its default, its help, the group of the help it stands in, and what it may be.

    A value lies in `choices` where there are any; it is at least `low` and at most `high`, or between 0 and 1 for a
    `fraction`. `read_if` names the option, and its value, without which nothing reads this one: it is then None, and
    giving it is refused. So it is with --like for an option that is `from_like`: the model or dataset named there
    settles it. An option that may stand without a value has the value `alone` then. `number` is what a `low` one is.
    """
    shown = {"default": default, "help": help, "group": group, "metavar": metavar}
    limits = {"choices": choices, "low": low, "high": high, "fraction": fraction, "read_if": read_if}
    return dataclasses.field(metadata={**shown, **limits, "from_like": from_like, "alone": alone, "number": number})


@dataclass
class Options:
    """What a dataset is made of: the same options and texts give a dataset that is equal bit for bit.

    dataset.json holds these in this order, and the fingerprint of a dataset is the hash of that file.
    """

    source: list[str] = option(  # noqa: RUF009 (`option` makes a field)
        [STDLIB],
        "stdlib (sentences from the documentation of Python's own standard library; the default), unicode (names of "
        "characters: short, and soon learned), files, directories "
        "or globs of .txt (a text a line), .jsonl or .parquet, hf:NAME[:CONFIG] or hf:PATH; a file or glob may also "
        "be of .text or .md (as .txt), .ndjson or .json (as .jsonl, or one array), .csv or .tsv; all but .parquet also "
        "with .gz or .zst behind; URLs (s3://..., gs://..., hf://...) of files, directories or globs likewise",
        group="texts",
        metavar="SOURCE",
    )
    text_key: str = option("text", "key or column of the text; a.b is b within a", group="texts")
    hf_split: str = option("train", "split of the Hugging Face dataset", group="texts")
    split_sentences: bool = option(False, "every sentence of a text is a sample", group="texts")
    max_samples: int | None = option(None, "stop after this many different texts", group="texts", low=2)
    validation_fraction: float = option(
        0.05, "share of the texts, chosen by content hash", group="texts", fraction=True
    )
    encode_fraction: float = option(
        1.0,
        "share of the training texts, chosen by content hash, that the encoder runs on; the others have no latent, "
        "and train the text cycle alone",
        group="texts",
        fraction=True,
    )
    unpaired: list[str] = option(  # noqa: RUF009
        [], "more training texts, without latents", group="texts", metavar="SOURCE"
    )
    unpaired_latents: str | None = option(
        None, "training latents without texts, .npy [rows, dimensions], or its URL", group="texts", metavar="FILE"
    )
    max_length: int = option(48, "tokens of a row; longer texts are dropped and counted", group="texts", low=1)
    shard_size: int = option(100_000, "texts of a shard", group="texts", low=1)
    seed: int = option(0, "seed of the encoder's fit", group="texts", low=0, high=LARGEST_SEED)
    tokenizer: str | None = option(
        "train",
        "tokenizer.json, its directory, a hub name, or train: byte-level BPE",
        group="tokenizer",
        from_like=True,
    )
    vocab_size: int | None = option(
        4096,
        "tokens of a trained tokenizer",
        group="tokenizer",
        low=MIN_VOCAB_SIZE,
        read_if=TRAINED_TOKENIZER,
        from_like=True,
    )
    mask_token: str | None = option(
        None, "the tokenizer's mask token, where its files do not name it", group="tokenizer", from_like=True
    )
    pad_token: str | None = option(
        None, "the tokenizer's padding token, where its files do not name it", group="tokenizer", from_like=True
    )
    encoder: str = option(
        LSA, "what makes the latents", group="latents", choices=(LSA, SENTENCE_TRANSFORMERS, MODEL2VEC), from_like=True
    )
    latent_dim: int | None = option(64, "lsa: dimensions", group="latents", low=1, read_if=WITH_LSA, from_like=True)
    lsa_features: str | None = option(
        WORDS,
        "lsa: what a text is counted in: words, or letters (runs of two and three, which know spelling)",
        group="latents",
        choices=(WORDS, LETTERS),
        read_if=WITH_LSA,
        from_like=True,
    )
    encoder_model: str | None = option(
        None,
        "sentence_transformers, model2vec: model name or directory",
        group="latents",
        read_if=WITH_A_MODEL,
        from_like=True,
    )
    truncate_dim: int | None = option(
        None,
        "sentence_transformers, model2vec: keep the first dimensions",
        group="latents",
        low=1,
        read_if=WITH_A_MODEL,
        from_like=True,
    )
    encoder_batch_size: int | None = option(
        32, "sentence_transformers: texts of a batch", group="latents", low=1, read_if=WITH_SENTENCE_TRANSFORMERS
    )
    encoder_dtype: str | None = option(
        "float32",
        "sentence_transformers: type of the weights",
        group="latents",
        choices=("float32", "bfloat16", "float16"),
        read_if=WITH_SENTENCE_TRANSFORMERS,
        from_like=True,
    )
    encoder_prompt: str | None = option(
        None,
        "sentence_transformers: what is put before every text, as the model's card says ('query: ')",
        group="latents",
        metavar="TEXT",
        read_if=WITH_SENTENCE_TRANSFORMERS,
        from_like=True,
    )
    normalize: bool | None = option(
        False,
        "sentence_transformers, model2vec: latents of length 1",
        group="latents",
        read_if=WITH_A_MODEL,
        from_like=True,
    )
    latents: str | None = option(
        None,
        "latents that you have, .npy [texts, dimensions] or its URL, a row for every text in reading order; no encoder "
        "runs",
        group="latents",
        metavar="FILE",
        from_like=True,
    )
    latents_key: str | None = option(
        None,
        "or the key or column of the latent, a list of numbers, in the records of the sources",
        group="latents",
        metavar="KEY",
        from_like=True,
    )
    like: str | None = option(
        None,
        "prepared data, a run or an export whose tokenizer and encoder are taken, and whose longest row "
        "unless --max-length is given",
        metavar="PATH",
    )
    python: str | None = dataclasses.field(init=False)  # whose standard library was read; no option of the command

    def __post_init__(self) -> None:
        self.python = platform.python_version() if set(EMBEDDED) & set(self.source) else None


@dataclass
class LocalOptions:
    """What may differ from one call to the next for the same dataset: how this machine comes by the same result."""

    encoder_device: str | None = option(
        None,
        "sentence_transformers: device (each process its GPU, where there is one)",
        group="latents",
        read_if=WITH_SENTENCE_TRANSFORMERS,
    )
    local_files_only: bool = option(False, "take tokenizer and model from the local cache")
    array_tasks: int | None = option(
        None,
        "this process is one of so many tasks of a SLURM array, or pods of an indexed Kubernetes Job, which divide the "
        "shards; at least two of them must run at a time",
        low=1,
        metavar="N",
    )
    ray: str | None = option(
        None,
        "make the latents on a Ray cluster: the one at ADDRESS (host:port); without it the one that this command was "
        "submitted to, or that runs on this machine; if there is none, or `local` is given, one of this machine alone",
        group="Ray",
        metavar="ADDRESS",
        alone="",
    )
    ray_actors: int | None = option(
        None, "actors, each with an encoder (as many as there is work and room for)", group="Ray", low=1, metavar="N"
    )
    ray_gpus_per_actor: float | None = option(
        None,
        "GPUs of an actor, or the share of one (1 for sentence_transformers where the cluster has GPUs, else 0)",
        group="Ray",
        low=0,
        number=float,
        metavar="GPUS",
    )


def flag(name: str) -> str:
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"

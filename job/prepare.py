"""Turn texts into a dataset: `python -m job.prepare --out DIR [--source ...]`, or under torchrun or srun."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from job.arguments import Fraction, at_least
from job.command import guarded
from job.data import tokenizer as tokenizers
from job.data.earlier import finished
from job.data.encoders import GIVEN
from job.data.like import Pattern, read_pattern
from job.data.options import WITH_A_MODEL, LocalOptions, Options, flag
from job.data.preparation import prepare
from job.data.preview import preview
from job.data.shards import DatasetInfo, ShardDataset
from job.data.work import Preparation
from job.errors import UsageError, UserError
from job.files import is_url, storage_problem
from job.row_kinds import LATENT
from job.runtime.launcher_variables import Placement, array_placement, keep_ray_quiet, placement

DECLARED = [f for declaration in (Options, LocalOptions) for f in dataclasses.fields(declaration) if f.init]
EXAMPLES = 3  # texts shown of a finished dataset
NOT_SHOWN = ("sha256", "directory")  # of an encoder's description
T = TypeVar("T", Options, LocalOptions)


def settled_late(option: dataclasses.Field[Any]) -> bool:
    """Whether an option's default depends on another option."""
    declared = option.metadata
    return bool(declared["read_if"] or declared["from_like"] or option.name == "max_length")


def add_option(group: argparse._ActionsContainer, option: dataclasses.Field[Any]) -> None:
    """Put a declared option on the command line. What its value is follows from its default and its limits."""
    name, declared = flag(option.name), option.metadata
    default, text, low = declared["default"], declared["help"], declared["low"]
    if isinstance(default, (str, int, float)) and not isinstance(default, bool):
        text = f"{text} ({default})"
    if settled_late(option):
        default = None  # whether it was given must be seen; `resolve` fills the default in
    if isinstance(declared["default"], bool):
        group.add_argument(name, action="store_true", default=default, help=text)
    elif isinstance(default, list):
        group.add_argument(name, nargs="+", default=default, metavar=declared["metavar"], help=text)
    elif declared["alone"] is not None:
        alone, metavar = declared["alone"], declared["metavar"]
        group.add_argument(name, nargs="?", const=alone, default=default, metavar=metavar, help=text)
    elif low is not None:
        kind, metavar = declared["number"], declared["metavar"]
        action = at_least(low, declared["high"])
        group.add_argument(name, type=kind, action=action, default=default, metavar=metavar, help=text)
    elif declared["fraction"]:
        group.add_argument(name, type=float, action=Fraction, default=default, help=text)
    else:
        group.add_argument(name, choices=declared["choices"], default=default, metavar=declared["metavar"], help=text)


def directory(name: str) -> Path:
    """The directory of a dataset that is to be written. UsageError for what is none."""
    if not name:
        raise UsageError("--out is empty: give a directory")
    if is_url(name):
        raise UsageError(
            f"--out {name}: datasets are written to a directory, not to a store; copy it when it is finished"
        )
    return Path(name)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m job.prepare",
        description="Turn texts into shards of tokens and latents. Interrupted, the same command goes on; "
        "under torchrun or srun the processes divide the shards.",
    )
    p.add_argument("--out", type=directory, help="directory of the dataset")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="count texts, lengths, duplicates and what would be dropped, show examples, and write nothing",
    )
    groups: dict[str | None, argparse._ActionsContainer] = {None: p}
    for option in DECLARED:
        title = option.metadata["group"]
        if title not in groups:
            groups[title] = p.add_argument_group(title)
        add_option(groups[title], option)
    return p


def resolve(arguments: argparse.Namespace, pattern: Pattern | None) -> None:
    """Fill in the defaults of options that depend on another. UsageError for one that nothing reads, or that lacks."""
    settled = pattern.options() if pattern else {}
    if not pattern and (arguments.latents or arguments.latents_key):
        settle_given(arguments)
    for option in DECLARED:
        name, declared = option.name, option.metadata
        given = getattr(arguments, name)
        if pattern and declared["from_like"]:
            if given is not None:
                raise UsageError(f"{flag(name)} has no effect with --like, which settles it; leave it out")
            setattr(arguments, name, settled.get(name))
        elif declared["read_if"]:
            other, wanted = declared["read_if"]
            there = getattr(arguments, other)
            values = (wanted,) if isinstance(wanted, str) else wanted
            if there in values and given is None:
                setattr(arguments, name, declared["default"])
            elif there not in values and given is not None:
                if there == GIVEN:
                    raise UsageError(f"{flag(name)} has no effect with latents that are given; leave it out")
                raise UsageError(
                    f"{flag(name)} has no effect with {flag(other)} {there}; "
                    f"leave it out or give {flag(other)} {' or '.join(values)}"
                )
        elif given is None and name == "max_length" and pattern:
            arguments.max_length = pattern.max_length
        elif given is None:
            setattr(arguments, name, declared["default"])
    if arguments.tokenizer == "train" and (arguments.mask_token or arguments.pad_token):
        raise UsageError("--mask-token and --pad-token have no effect with --tokenizer train; leave them out")
    if not pattern and arguments.encoder in WITH_A_MODEL[1] and not arguments.encoder_model:
        raise UsageError(f"--encoder {arguments.encoder} needs --encoder-model NAME or DIRECTORY")
    model = arguments.encoder_model or ""
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():  # the hub's libraries take it for a name there
        raise UsageError(f"--encoder-model {model}: no such directory")


def settle_given(arguments: argparse.Namespace) -> None:
    """No encoder where the latents are there. UsageError for an option that does not go with that."""
    if arguments.latents and arguments.latents_key:
        raise UsageError("--latents and --latents-key: both say where the latents are; leave one out")
    name = "--latents" if arguments.latents else "--latents-key"
    if arguments.encoder is not None:
        raise UsageError(f"--encoder has no effect with {name}, which gives the latents; leave it out")
    if arguments.split_sentences:
        raise UsageError(f"--split-sentences: {name} gives a latent for a whole text, not for each of its sentences")
    arguments.encoder = GIVEN


def settle_ray(arguments: argparse.Namespace, here: Placement) -> None:
    """UsageError where options of Ray, or processes that share the work in another way, do not go together."""
    if arguments.ray is None:
        for name in ("ray_actors", "ray_gpus_per_actor"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"{flag(name)} has no effect without --ray; leave it out or give --ray")
        return
    if here.world_size > 1:
        raise UsageError(
            f"--ray: this is one of {here.world_size} processes that share the work; start one, or leave out --ray"
        )
    keep_ray_quiet()


def taken(declaration: type[T], arguments: argparse.Namespace) -> T:
    """The options of one declaration."""
    names = [f.name for f in dataclasses.fields(declaration) if f.init]
    return declaration(**{name: getattr(arguments, name) for name in names})


def summary(out: Path, info: DatasetInfo) -> str:
    """A short account of a finished dataset."""
    made, counts = info.options, info.counts
    dropped = f"{made['duplicates']} duplicates, {made['dropped']} longer than --max-length {made['max_length']}"
    if made.get("without_latent"):
        why = "whose latent is zero" if info.encoder["name"] == GIVEN else "of which the encoder knows no word"
        dropped += f", {made['without_latent']} {why}"
    encoder = ", ".join(f"{key} {value}" for key, value in info.encoder.items() if key not in NOT_SHOWN)
    mean = sum(info.token_counts) / sum(info.rows_of_kinds("train")[:LATENT])
    paired, texts, latents = info.rows_of_kinds("train")
    unpaired = f" ({paired} with latents, {texts} without; {latents} latents without texts)" if info.unpaired else ""
    lines = [
        f"{out}: {paired + texts} training and {counts['validation']} validation texts{unpaired}",
        f"  dropped      {dropped}",
        f"  tokens       vocabulary {info.vocab_size}, {mean:.1f} a text, at most {info.max_length}",
        f"  latents      {info.latent_dim} dimensions from {encoder}",
    ]
    if made["dropped"] > sum(counts.values()):
        lines.append(
            "  more than half of the texts were dropped: raise --max-length, or cut texts with --split-sentences"
        )
    rows = ShardDataset(out, "validation")
    if tokenizer := tokenizers.of_dataset(out, info):
        if unknown := made.get("unknown_tokens"):
            share = info.token_counts[tokenizer.unknown_token_id or 0] / sum(info.token_counts)
            lines.append(
                f"  unknown      {unknown} tokens, {share:.1%} in training, stand for what the tokenizer cannot write; "
                "of these words or characters nothing is learned"
            )
        lines += [f"  for example  {tokenizer.decode(rows[index][0])}" for index in range(min(EXAMPLES, len(rows)))]
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Prepare what the command line says, or go on with it."""
    pattern = read_pattern(arguments.like) if arguments.like else None
    resolve(arguments, pattern)
    here = array_placement(os.environ, arguments.array_tasks) if arguments.array_tasks else None
    here = here or placement(os.environ, alone=True)
    settle_ray(arguments, here)
    if arguments.dry_run:
        if here.rank == 0:
            print(preview(taken(Options, arguments), taken(LocalOptions, arguments), pattern))
        return
    if arguments.out is None:
        raise UsageError("--out DIR is missing: where the dataset is to be written (--dry-run needs none)")
    preparation = Preparation(
        out=arguments.out,
        options=taken(Options, arguments),
        local=taken(LocalOptions, arguments),
        rank=here.rank,
        local_rank=here.local_rank,
        world_size=here.world_size,
        run=f"{here.address}:{here.port} {here.run_id}",
        pattern=pattern,
    )
    try:
        before = finished(preparation)
        info = before or prepare(preparation)
    except OSError as error:  # the error of a full disk names no file
        problem = storage_problem(error) or f"{error.filename or arguments.out}: {error.strerror or error}"
        raise UserError(problem) from error
    if info and preparation.rank == 0:
        print((f"{arguments.out}: finished already\n" if before else "") + summary(arguments.out, info))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return guarded(lambda: run(parser().parse_args(argv)), output_is_result=False)


if __name__ == "__main__":
    sys.exit(main())

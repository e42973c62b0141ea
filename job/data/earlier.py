"""What an earlier call left in a directory, and whether this command is a repetition of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from job.data import source_files
from job.data.console import say
from job.data.options import flag
from job.data.shards import DatasetInfo, read_info
from job.data.work import Preparation, read_json
from job.errors import UserError
from job.files import file_entry


def finished(preparation: Preparation) -> DatasetInfo | None:
    """The dataset in the directory, if it is there.

    UserError if it was prepared with other options, or of files that have changed since.
    """
    if not preparation.info_file.is_file():
        return None
    info = read_info(preparation.out)
    if preparation.rank == 0:
        refuse_other_options(preparation, info.options)
        if preparation.pattern and info.tokenizer:
            tokenizer_sha256 = info.files[info.tokenizer]["sha256"]
            preparation.pattern.refuse_other(preparation.out, tokenizer_sha256, info.encoder)
        refuse_other_sources(preparation, info.options, info.options.get("source_files"))
    return info


def earlier_plan(preparation: Preparation) -> dict[str, Any] | None:
    """The plan of an earlier call that can be gone on with. UserError if it is one of something else."""
    if not preparation.plan_file.is_file():
        return None
    plan = read_json(preparation.plan_file)
    refuse_other_sources(preparation, plan["options"], plan.get("source_files"))
    refuse_other_options(preparation, plan["options"])
    if not is_whole(plan):
        return None
    if preparation.pattern:
        tokenizer_sha256 = file_entry(preparation.tokenizer_file)["sha256"]
        preparation.pattern.refuse_other(preparation.out, tokenizer_sha256, plan["encoder"])
    say(f"going on with the work in {preparation.out}")
    return plan


def is_whole(plan: dict[str, Any]) -> bool:
    """Whether a plan says all that this version needs; one of before November 2026 does not, and is made anew."""
    return "encoder" in plan and "source_files" in plan


def refuse_other_options(preparation: Preparation, there: dict[str, Any]) -> None:
    """UserError naming the first option in which a directory differs from this command.

    Sources, and what --like, --latents and --unpaired-latents name, are compared by their content elsewhere.
    """
    defaults = {option.name: option.metadata.get("default") for option in dataclasses.fields(preparation.options)}
    for name, value in dataclasses.asdict(preparation.options).items():
        if name not in there and value == defaults[name]:
            continue  # an option that there was none of yet
        by_content = name == "source" or (
            name in ("like", *source_files.LATENTS) and value is not None and there.get(name) is not None
        )
        if not by_content and there.get(name) != value:
            _refuse(preparation, name, there)


def refuse_other_sources(
    preparation: Preparation, there: dict[str, Any], before: Sequence[source_files.Entry] | None
) -> None:
    """UserError when the texts are not those that a directory was prepared from, by the content of their files.

    Files that are gone, which a finished dataset does not need any more, and directories of older versions, which do
    not know their files, are compared by the name of their source.
    """
    options = preparation.options
    try:
        now = source_files.of_options(options, before or ())
    except UserError as error:
        if there.get("source") != options.source:
            _refuse(preparation, "source", there)
        say(f"note: {error}; what was read of it before is used")
        return
    if before is not None and options.unpaired_latents and len(before) == len(now) - 1:
        now = now[:-1]  # before 2026-11-27 that file was not noted
    if before is None:
        if there.get("source") != options.source:
            _refuse(preparation, "source", there)
    elif changed := source_files.difference(before, now):
        raise UserError(
            f"{changed} since {preparation.out} was prepared; "
            "give another --out, or delete the directory to prepare it anew"
        )


def _refuse(preparation: Preparation, name: str, there: dict[str, Any]) -> None:
    raise UserError(
        f"{preparation.out}: was prepared with {flag(name)} {there.get(name)}, "
        f"not {getattr(preparation.options, name)}; give the same options, another --out, or delete the directory"
    )

"""The stages of `python -m job.prepare`, which a kill may interrupt anywhere and several processes may share.

    rank 0     texts -> split and shards of text, tokenizer, fitted encoder -> plan.json
    all ranks  every world_size-th shard: tokens and latents -> record
    rank 0     all records -> dataset.json

Each stage leaves its result in DIR/work, and every file appears whole or not at all, so a file that exists is a stage
that is done. Apart from the lock of rank 0, that is all that the processes know of each other: there is no process
group. Rank 0 writes plan.json last of its first stage and the others wait for it; a shard belongs to one rank by its
number; its record is written after its files. A killed process leaves files without a record, which are written again,
to the same bits. dataset.json comes last and makes the directory a dataset; then DIR/work goes.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from job.data import failed, lock, on_ray, source_files
from job.data.console import CountedWork, say
from job.data.earlier import earlier_plan, finished, is_whole, refuse_other_options
from job.data.encoders import ENCODER_FILE, GIVEN, LSA, SENTENCE_TRANSFORMERS, Encoder
from job.data.encoding import KeptLatents, LoadedWhenNeeded, encode_shard
from job.data.fitting import Fitting
from job.data.given import GivenEncoder, GivenLatents, description
from job.data.reading import read_into, refuse_empty
from job.data.remote import fetch
from job.data.shards import DatasetInfo
from job.data.splitting import Division
from job.data.text_shards import TextShards
from job.data.text_store import TextStore
from job.data.unpaired import finite_latents, write_latents, write_texts
from job.data.work import Preparation, TextShard, read_json
from job.data.writer import ShardRecord, write_info, write_shard
from job.errors import UserError
from job.files import TEMPORARY, write_json
from job.row_kinds import PAIRED

POLL_SECONDS = 0.1
# A file system of a network shows a new file this late at worst, where it was looked for in vain before.
LATE_SECONDS = 60


def prepare(preparation: Preparation) -> DatasetInfo | None:
    """Do this process's part. Returns the finished dataset's description on rank 0, None on the others."""
    preparation = dataclasses.replace(preparation, failed_before=failed.read(preparation.out))
    try:
        return _prepare(preparation)
    except (UserError, OSError) as error:
        if preparation.local.array_tasks:
            failed.write(preparation.out, preparation.run, preparation.rank, str(error))
        raise


def _prepare(preparation: Preparation) -> DatasetInfo | None:
    if preparation.rank:
        _help(preparation)
        return None
    with lock.held(preparation.out, preparation.run):
        failed.forget(preparation.out)
        if info := finished(preparation):  # by a preparation that held the lock until now
            return info
        with on_ray.connected(preparation.local):
            plan = earlier_plan(preparation) or _plan(preparation)
            _write_shards(preparation, plan)
        return _finish(preparation, plan)


def _help(preparation: Preparation) -> None:
    """The part of a rank other than 0.

    Where every shard was done in an earlier call, rank 0 needs nobody: it may write dataset.json and remove DIR/work
    at any moment, also between two files that are read here. Then this rank is done too.
    """
    _wait(preparation, lambda: preparation.info_file.is_file() or _is_planned(preparation), "the first one's plan")
    try:
        if not preparation.info_file.is_file():
            plan = read_json(preparation.plan_file)
            refuse_other_options(preparation, plan["options"])
            _write_shards(preparation, plan)
    except FileNotFoundError:
        if not _wait(preparation, preparation.info_file.is_file, "dataset.json", LATE_SECONDS):
            raise


def _is_planned(preparation: Preparation) -> bool:
    """Whether rank 0 of this very run holds the directory, and a plan is there."""
    if not lock.is_held_for(preparation.out, preparation.run):
        return False
    try:
        return is_whole(read_json(preparation.plan_file))
    except FileNotFoundError:
        return False


def _plan(preparation: Preparation) -> dict[str, Any]:
    """Rank 0's first stage: everything that needs all the texts."""
    # Without a plan, what lies here is a first stage that was killed. It starts anew: nothing says with what options.
    shutil.rmtree(preparation.work, ignore_errors=True)
    try:
        return _read_and_fit(preparation)
    except BaseException:
        shutil.rmtree(preparation.work, ignore_errors=True)
        raise


def _read_and_fit(preparation: Preparation) -> dict[str, Any]:
    options = preparation.options
    fitting = Fitting(options, preparation.local, preparation.pattern, preparation.resources)
    files = source_files.of_options(options)
    directory = preparation.work / "sorting"
    if options.unpaired_latents:
        # They are written last, but a mistake in them should be told before texts are encoded for hours.
        name = options.unpaired_latents
        finite_latents(name, fetch(name, "--unpaired-latents", directory / "unpaired.npy"))
    latents = fetch(options.latents, "--latents", directory / "latents.npy") if options.latents else None
    given = GivenLatents(options, latents, preparation.work / "given.float32") if options.encoder == GIVEN else None
    if given:
        fitting.given = description(options, files, latents)
    with TextStore(directory) as store:
        read_into(store, options, given)
        source_files.refuse_touched(files, source_files.names(options))
        division = Division(options.validation_fraction, options.encode_fraction)
        shards = TextShards(store, division, preparation.work, options.shard_size, given)
    shutil.rmtree(directory)
    refuse_empty(options, shards.counts, store.duplicates)
    fitted = fitting.fit(preparation.out, shards.to_fit_on())
    plan = {
        "options": dataclasses.asdict(options),
        "source_files": files,
        "unpaired_latents": files[-1] if options.unpaired_latents else None,
        "duplicates": store.duplicates,
        "shards": shards.number(),
        "encoded_shards": shards.encoded,  # of the training split; the shards after them are texts alone
        **fitted,
    }
    write_json(preparation.plan_file, plan)
    return plan


def _write_shards(preparation: Preparation, plan: dict[str, Any]) -> None:
    """Write this rank's share of the shards, finished ones left out.

    Every world_size-th shard, so that the share is known without asking anyone. A later call with another number of
    processes divides what is left anew.
    """
    share = preparation.shards(plan)[preparation.rank :: preparation.world_size]
    left = [shard for shard in share if not shard.record_file.exists()]
    # Records that are missing since rank 0 has finished and removes them (see `_help`) are not work left to do.
    if not left or preparation.info_file.is_file():
        return  # without loading the encoder
    read_json(left[0].texts_file)
    encoder: Encoder | None = None
    tokenizer = preparation.tokenizer(plan)
    for shard in _as_latents_come(preparation, plan, left):
        texts = read_json(shard.texts_file)
        name = f"{shard.split} shard {shard.number}"
        if _is_text_alone(shard, plan):
            write_json(shard.record_file, dataclasses.asdict(write_texts(preparation, shard, texts, tokenizer, plan)))
            continue
        if plan["encoder"]["name"] == GIVEN:
            encoder = GivenEncoder(texts, np.load(shard.latents_file))
        encoder = encoder or LoadedWhenNeeded(preparation.out, plan["encoder"], preparation.resources)
        # An encoder that is fitted or given is as fast as the files that would keep its latents.
        is_kept = plan["encoder"]["name"] == SENTENCE_TRANSFORMERS or preparation.local.ray is not None
        kept = KeptLatents(shard) if is_kept else None
        with CountedWork(name, len(texts)) as work:
            encoded = encode_shard(texts, tokenizer, encoder, preparation.options.max_length, work, kept)
        # Half precision overflows in some models. Written down, such a latent would show only in training, as a loss
        # that is not finite at whatever step draws it.
        if not np.isfinite(encoded.latents).all():
            raise UserError(f"the encoder gave a latent that is not finite, in {name}; try --encoder-dtype float32")
        record = write_shard(
            preparation.out, shard.split, shard.number, encoded.rows, encoded.latents, plan["vocab_size"]
        )
        record.without_latent = encoded.without_latent
        record.dropped = len(texts) - len(encoded.rows) - encoded.without_latent
        write_json(shard.record_file, dataclasses.asdict(record))
        if kept:
            kept.remove()
        say(f"{name}: {record.rows} rows")


def _as_latents_come(
    preparation: Preparation, plan: dict[str, Any], shards: Sequence[TextShard]
) -> Iterable[TextShard]:
    """The shards in their order, or as Ray gets done with their latents; those that need none come last then."""
    if preparation.local.ray is None or plan["encoder"]["name"] == GIVEN:
        return shards
    alone = [shard for shard in shards if _is_text_alone(shard, plan)]
    others = [shard for shard in shards if not _is_text_alone(shard, plan)]
    return chain(on_ray.shards_with_latents(preparation, plan, others) if others else (), alone)


def _is_text_alone(shard: TextShard, plan: dict[str, Any]) -> bool:
    """Whether a shard's texts get no latents; plans of before there were such have no number of encoded shards."""
    return shard.split == "train" and shard.number >= plan.get("encoded_shards", plan["shards"]["train"])


def _finish(preparation: Preparation, plan: dict[str, Any]) -> DatasetInfo:
    """Rank 0's last stage: wait for the other ranks' records, and make the directory a dataset."""
    files = [shard.record_file for shard in preparation.shards(plan)]
    _wait(preparation, lambda: all(file.exists() for file in files), "the other ones' shards")
    records = [ShardRecord(**read_json(file)) for file in files]
    if not any(record.rows for record in records if record.split == "train" and record.kind == PAIRED):
        if all(record.without_latent for record in records if record.split == "train" and record.kind == PAIRED):
            raise UserError("no training text that fits --max-length has a latent that is not zero")
        raise UserError(
            f"every text is longer than --max-length {preparation.options.max_length} tokens; "
            "raise it, or cut texts with --split-sentences"
        )
    tokenizer = preparation.tokenizer(plan)
    unknown = tokenizer.unknown_token_id
    counted = [record for record in records if record.token_counts]
    if preparation.options.unpaired_latents:
        records += _unpaired_latents(preparation, records, plan)
    options = dataclasses.asdict(preparation.options)
    options["duplicates"] = plan["duplicates"]
    options["dropped"] = sum(record.dropped for record in records)
    options["without_latent"] = sum(record.without_latent for record in records)
    options["unknown_tokens"] = 0 if unknown is None else sum(record.token_counts[unknown] for record in counted)
    options["source_files"] = source_files.contents(plan["source_files"])
    info = write_info(
        preparation.out,
        records,
        vocab_size=plan["vocab_size"],
        mask_token_id=plan["mask_token_id"],
        pad_token_id=plan["pad_token_id"],
        tokenizer=preparation.tokenizer_file.name,
        encoder=plan["encoder"],
        options=options,
        generated_by="python -m job.prepare",
        encoder_file=ENCODER_FILE if plan["encoder"]["name"] == LSA else None,
    )
    shutil.rmtree(preparation.work, ignore_errors=True)
    for leftover in preparation.out.glob(f".*{TEMPORARY}"):  # of a process killed while it wrote
        leftover.unlink()
    return info


def _unpaired_latents(preparation: Preparation, records: list[ShardRecord], plan: dict[str, Any]) -> list[ShardRecord]:
    """Write the rows of --unpaired-latents. UserError where the file is not the one that was there at first."""
    name = str(preparation.options.unpaired_latents)
    file = fetch(name, "--unpaired-latents", preparation.work / "unpaired.npy")
    written = write_latents(preparation, records, file)
    noted = plan.get("unpaired_latents")  # plans of before 2026-11-27 do not say
    now = source_files.entry_of("unpaired_latents", name, plan["source_files"])
    if noted and (changed := source_files.difference([noted], [now])):
        raise UserError(
            f"{changed} since {preparation.out} was begun; "
            "give another --out, or delete the directory to prepare it anew"
        )
    return written


def _wait(preparation: Preparation, ready: Callable[[], bool], what: str, seconds: float = float("inf")) -> bool:
    """Wait for other processes. Returns whether they were `ready` in time. UserError where one says that it failed.

    Polling a shared directory is all that works on every cluster's file system.
    """
    began = time.monotonic()
    is_told = False
    while not ready():
        waited = time.monotonic() - began
        if preparation.local.array_tasks:
            # What was there at first is of the attempt before (a requeued array, pods that are made again), if the
            # first task forgets it soon.
            ignored = preparation.failed_before if waited < LATE_SECONDS else None
            failed.refuse(preparation.out, preparation.run, ignored)
        if waited > seconds:
            return False
        if waited > LATE_SECONDS and not is_told:
            is_told = True
            say(f"process {preparation.rank} of {preparation.world_size} waits for {what}, in {preparation.out}")
        time.sleep(POLL_SECONDS)
    return True

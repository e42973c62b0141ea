"""Latents of a preparation made by Ray Data: `python -m job.prepare ... --ray` (the extra `ray`).

    this process      texts -> split and shards of text, tokenizer, fitted encoder -> plan.json, as without Ray
    read_chunks       a shard -> its chunks of texts, on the node of this process
    LatentsOfChunks   the texts of a chunk that fit into a row -> latents, on any node: an encoder in every actor
    this process      latents -> the files that a killed preparation goes on from -> shards, dataset.json

Ray makes what costs the time, and leaves it where the code that runs without Ray finds it, as if that had been killed
behind a shard's last chunk. So the bits are the same by construction, and a directory can be gone on with in either
way. Texts and latents travel through Ray's object store: neither the sources nor --out need be where other nodes see
them. Reading, sorting and fitting stay in one process, since Ray's own readers know neither the rows that our errors
name nor a sort in bounded memory; a model takes many times as long.

Chunks come back in any order, and are put in their places by their numbers.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from job.data.console import CountedWork, say
from job.data.encoders import ENCODER_FILE, SENTENCE_TRANSFORMERS, Encoder, load_encoder
from job.data.fitting import chunks, fits
from job.data.optional import import_optional
from job.data.options import LocalOptions
from job.data.tokenizer import TextTokenizer
from job.data.work import Preparation, TextShard, read_json
from job.errors import RetryError, UserError
from job.files import write_whole

PACKAGE = "ray[data]"
CLIENT = "ray://"
NODE = "ray.io/node-id"  # label of a node that Ray gives it
QUIET_SECONDS = 300

Row = dict[str, Any]


@contextmanager
def connected(local: LocalOptions) -> Iterator[None]:
    """Hold a connection to the cluster of --ray, where that is given. UserError if there is none to be used.

    With the connection end the actors, and a cluster that was started for it.
    """
    if local.ray is None:
        yield
        return
    ray = import_optional("ray", PACKAGE)
    import_optional("ray.data", PACKAGE)
    _connect(ray, local.ray)
    try:
        with interrupts_kept():
            _refuse_bare_nodes(ray)
            yield
    except ray.exceptions.RayTaskError:
        raise  # a mistake in this program, which the traceback shows
    except ray.exceptions.RayError as error:
        raise RetryError(f"Ray: {_first_line(error)}; give the same command again, it goes on") from error
    finally:
        ray.shutdown()


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Let Ctrl-C end what is done meanwhile, where Ray loses it.

    Python raises KeyboardInterrupt wherever the main thread is. In one of Ray's destructors or callbacks it would be
    printed, or not even that, and the work would go on: so it is raised again every second until it comes out.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked, out = threading.Event(), threading.Event()

    def interrupt(*_: object) -> None:
        asked.set()
        raise KeyboardInterrupt

    def insist() -> None:
        asked.wait()
        while not out.wait(1):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupt)
    thread = threading.Thread(target=insist, daemon=True)
    thread.start()
    try:
        yield
    finally:
        out.set()
        asked.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


def _connect(ray: Any, address: str) -> None:
    if address.startswith(CLIENT):
        raise UserError(
            f"--ray {address}: a client outside of the cluster cannot do this; start the command on one of its nodes, "
            "as `ray job submit -- python -m job.prepare ... --ray` does"
        )
    # What Ray itself says would stand between our lines, with a traceback for every loss. Its dashboard has it all.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        _knock(address)
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # of many classes, as the cluster is not there, or of another version
        raise UserError(f"--ray {address}".rstrip() + f": no cluster to use ({_first_line(error)})") from error


def _knock(address: str) -> None:
    """OSError where nothing listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _refuse_bare_nodes(ray: Any) -> None:
    """Say how large the cluster is. UserError for a node that lacks this package."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    # A function of the standard library: one of this package could not be read where that is missing.
    find = ray.remote(num_cpus=0)(importlib.util.find_spec)
    found = [find.options(label_selector={NODE: node["NodeID"]}).remote("job") for node in nodes]
    for node, package in zip(nodes, ray.get(found), strict=True):
        if package is None:
            raise UserError(
                f"--ray: the node {node['NodeManagerAddress']} has no Python package cyclevae; install it on all nodes"
            )
    there = ray.cluster_resources()
    say(f"Ray: {len(nodes)} nodes, {there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs")


def shards_with_latents(
    preparation: Preparation, plan: dict[str, Any], shards: Sequence[TextShard]
) -> Iterator[TextShard]:
    """Each of the shards, as soon as the latents of all its chunks are in their files, in whatever order.

    UserError where the encoder cannot be used on a node.
    """
    ray = import_optional("ray", PACKAGE)
    context = import_optional("ray.data", PACKAGE).DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # byte: a block for every chunk, so that all actors share a shard
    shards = [replace(shard, work=shard.work.absolute()) for shard in shards]  # Ray's processes run elsewhere
    there = (preparation.tokenizer_file, preparation.out / ENCODER_FILE)
    files = ray.put({path.name: path.read_bytes() for path in there if path.is_file()})
    needed = {key: plan[key] for key in ("encoder", "mask_token_id", "pad_token_id")}
    gpus = gpus_of_actor(preparation.local, plan, ray.cluster_resources())
    if gpus > max(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]):
        say(f"Ray: no node has {gpus:g} GPUs, as every actor needs; waiting for one that has (--ray-gpus-per-actor)")
    rows = (
        ray.data.from_items([{"shard": index} for index in range(len(shards))])
        # No CPU: the node of this process may have none to give, as the head of a cluster often has.
        .flat_map(
            partial(read_chunks, shards),
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=1),
            label_selector={NODE: ray.get_runtime_context().get_node_id()},
        )
        .map(
            LatentsOfChunks,
            fn_constructor_args=(replace(preparation, pattern=None), needed, files),
            num_gpus=gpus,
            compute=ray.data.ActorPoolStrategy(size=preparation.local.ray_actors),
        )
    )
    left: dict[int, set[int]] = {}  # chunks of each shard that has begun to come
    with CountedWork("texts") as work, silence_told() as came:
        for row in rows.iter_rows():
            came.set()
            if row["problem"]:
                raise UserError(row["problem"])
            shard = shards[row["shard"]]
            if row["latents"]:
                write_whole(shard.chunk_file(row["chunk"]), partial(_write, row["latents"]))
            work.add(row["texts"])
            missing = left.setdefault(row["shard"], set(range(row["chunks"])))
            missing.discard(row["chunk"])
            if not missing:
                yield shard


@contextmanager
def silence_told(seconds: float = QUIET_SECONDS) -> Iterator[threading.Event]:
    """An event to be set whenever something comes back; a line says so when nothing has come for long.

    Ray waits without a word for room that no node has, and gives a chunk whose actor died to another one, for ever.
    """
    came, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            if not came.wait(seconds):
                say(f"Ray: nothing came back for {seconds:g} seconds; its dashboard, or `ray status`, says why")
            came.clear()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield came
    finally:
        ended.set()
        came.set()
        thread.join()


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def gpus_of_actor(local: LocalOptions, plan: dict[str, Any], there: dict[str, float]) -> float:
    """GPUs, or the share of one, for which Ray finds every actor a place."""
    if local.ray_gpus_per_actor is not None:
        return local.ray_gpus_per_actor
    if plan["encoder"]["name"] != SENTENCE_TRANSFORMERS or local.encoder_device == "cpu":
        return 0
    return 1 if local.encoder_device or there.get("GPU") else 0


def read_chunks(shards: Sequence[TextShard], row: Row) -> list[Row]:
    """All chunks of a shard, {shard, chunk, chunks, texts: JSON}; without texts those whose latents are there."""
    shard = shards[row["shard"]]
    of_shard = list(chunks(read_json(shard.texts_file)))
    rows = []
    for number, texts in enumerate(of_shard):
        content = b"" if shard.chunk_file(number).is_file() else json.dumps(texts).encode()
        rows.append({"shard": row["shard"], "chunk": number, "chunks": len(of_shard), "texts": content})
    return rows


class LatentsOfChunks:
    """An actor: makes latents of chunks of texts.

    A mistake of the user's comes back as a row's `problem`. Raised here, it would come out of Ray within others.
    """

    def __init__(self, preparation: Preparation, plan: dict[str, Any], files: Any) -> None:
        """`files`: reference to the contents of the dataset's files that are needed, by name."""
        self.preparation, self.plan, self.files = preparation, plan, files
        self.loaded: tuple[TextTokenizer, Encoder] | None = None

    def __call__(self, row: Row) -> Row:
        """{shard, chunk, chunks, texts: how many, latents: of the texts that fit, as a .npy file, problem}."""
        texts = json.loads(row["texts"] or b"[]")
        latents, problem = b"", ""
        try:
            latents = self._latents(texts)
        except (UserError, OSError) as error:
            problem = str(error)
        return {**row, "texts": len(texts), "latents": latents, "problem": problem}

    def _latents(self, texts: list[str]) -> bytes:
        if not texts:
            return b""
        self.loaded = self.loaded or self._load()
        tokenizer, encoder = self.loaded
        longest = self.preparation.options.max_length
        chosen = [text for text, row in zip(texts, tokenizer.encode(texts), strict=True) if fits(row, longest)]
        if not chosen:
            return b""
        content = io.BytesIO()
        np.save(content, encoder.encode(chosen), allow_pickle=False)
        return content.getvalue()

    def _load(self) -> tuple[TextTokenizer, Encoder]:
        ray = import_optional("ray", PACKAGE)
        with tempfile.TemporaryDirectory() as directory:
            here = Path(directory)
            for name, content in ray.get(self.files).items():
                (here / name).write_bytes(content)
            tokenizer = replace(self.preparation, out=here).tokenizer(self.plan)
            return tokenizer, load_encoder(here, self.plan["encoder"], self.preparation.resources)

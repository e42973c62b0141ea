"""Data of a store that is copied to a node, and a run on it: of fsspec's memory, and of S3 (make test-remote)."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from tiny_run import configured, tiny_run

from job import evaluate, load
from job.command import guarded
from job.config_checks import validate
from job.data import cached
from job.data.cached import first_lengths, local_copy
from job.data.remote import RemoteDirectory
from job.data.shards import ShardDataset
from job.errors import ExitCode, StoppedError, UserError
from job.export import write_export
from job.planning.data import planned_data
from job.runtime.checkpoint import open_checkpoint
from job.train import train
from job.trained import load_trained, open_data

URL = "memory:///data/mine"


@pytest.fixture
def store(prepared: Path) -> Iterator[Any]:
    """A store with the dataset."""
    memory = fsspec.filesystem("memory")
    memory.put(f"{prepared}/", "/data/mine/", recursive=True)
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_copy_is_the_dataset_and_is_made_once(
    store: Any, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = local_copy(f"{URL}/", tmp_path)
    assert copy.name.startswith("mine-")
    there = files(prepared)
    assert {name: content for name, content in files(copy).items() if name in there} == there
    assert not list(copy.glob(".*"))
    monkeypatch.setattr(RemoteDirectory, "blocks", None)
    assert local_copy(f"{URL}/", tmp_path) == copy
    monkeypatch.undo()
    store.pipe("/data/mine/dataset.json", store.cat("/data/mine/dataset.json") + b"\n")
    assert local_copy(URL, tmp_path) != copy  # prepared anew


def test_an_interrupted_copy_goes_on(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    blocks = RemoteDirectory.blocks

    def counted(self: RemoteDirectory, name: str) -> Iterator[bytes]:
        read.append(name)
        return blocks(self, name)

    monkeypatch.setattr(RemoteDirectory, "blocks", counted)
    monkeypatch.setattr(cached, "AT_ONCE", 1)
    with pytest.raises(StoppedError, match="stopped while memory:///data/mine was copied"):
        local_copy(URL, tmp_path, stop=lambda: len(read) > 3)
    assert len(read) == 4
    assert not list(tmp_path.glob("*/dataset.json"))
    copy = local_copy(URL, tmp_path)
    names = {path.name for path in copy.iterdir()} - {"dataset.json"}
    assert set(read) == names
    assert len(read) == len(names) + 1  # the file in which it was stopped


def test_processes_of_a_node_wait_for_the_one_that_copies(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks, slow = RemoteDirectory.blocks, threading.Event()
    read: list[str] = []

    def waited(self: RemoteDirectory, name: str) -> Iterator[bytes]:
        read.append(name)
        slow.wait(20)
        return blocks(self, name)

    monkeypatch.setattr(RemoteDirectory, "blocks", waited)
    copies: list[Path] = []
    threads = [threading.Thread(target=lambda: copies.append(local_copy(URL, tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    slow.set()
    for thread in threads:
        thread.join()
    assert copies[0] == copies[1]
    assert len(read) == len(set(read))
    assert f"another process copies to {tmp_path}; waiting for it" in capsys.readouterr().err


def test_what_cannot_be_copied_is_refused(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"memory:///data/none: no finished dataset there"):
        local_copy("memory:///data/none", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"data\.cache_dir=.* needs 0\.\d MB more there, 0\.0 MB are free"):
        local_copy(URL, tmp_path)
    monkeypatch.undo()
    name = "/data/mine/train-00000.latents.npy"
    whole = store.cat(name)
    store.pipe(name, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"train-00000\.latents\.npy: corrupt, its size or SHA-256"):
        local_copy(URL, tmp_path)
    store.rm(name)
    with pytest.raises(UserError, match=r"train-00000\.latents\.npy: missing"):
        local_copy(URL, tmp_path)
    assert not list(tmp_path.glob("*/dataset.json"))
    with pytest.raises(UserError, match=r"data\.dir=s3://b/d is copied to each node; set data\.cache_dir"):
        validate(configured("data.dir=s3://b/d"))
    with pytest.raises(UserError, match=r"data\.cache_dir has no effect"):
        validate(configured("data.dir=d", "data.cache_dir=c"))


def test_a_run_trains_on_data_of_a_store(store: Any, prepared: Path, tmp_path: Path) -> None:
    options = [f"data.cache_dir={tmp_path / 'cache'}", "training.num_train_steps=2", "logging.num_generated=2"]
    run = tiny_run(tmp_path / "run", Path("unused"), f"data.dir={URL}", *options)
    (checkpoint,) = run.glob("checkpoints/step_*")
    assert open_checkpoint(checkpoint).record["data"] == ShardDataset(prepared, "train").fingerprint
    assert (run / "model" / "tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()
    (copy,) = (tmp_path / "cache").glob("mine-*")
    shutil.rmtree(tmp_path / "cache")
    train_data, _ = open_data(load_trained(run).config, None, run)  # as evaluation does: it is copied again
    assert (isinstance(train_data, ShardDataset) and train_data.directory) == copy
    here = tmp_path / "here"  # on another machine, which has no such directory
    held_out = load_trained(run, cache=here).held_out
    assert (isinstance(held_out, ShardDataset) and held_out.directory) == here / copy.name
    write_export(load_trained(run, data=URL, cache=here), tmp_path / "export")
    assert load_trained(tmp_path / "export", data=URL, cache=here).data == here / copy.name


def test_a_run_that_is_stopped_while_it_copies_ends_at_once(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job import train as command

    def endless(*_: object) -> Iterator[bytes]:
        while True:
            time.sleep(0.05)
            yield b"x"

    monkeypatch.setattr(RemoteDirectory, "blocks", endless)
    monkeypatch.setattr(command, "signals", command.StopSignals())
    before = signal.set_wakeup_fd(-1)
    command.signals.install()
    threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(StoppedError, match="the same command goes on") as stopped:
        train(configured(f"data.dir={URL}", f"data.cache_dir={tmp_path / 'cache'}"), tmp_path / "run")
    signal.set_wakeup_fd(before)  # or it would take another test's signal for the second, which ends this process
    assert stopped.value.exit_code == ExitCode.STOPPED


def test_a_plan_reads_the_size_of_the_data_and_copies_nothing(
    store: Any, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteDirectory, "blocks", None)
    local, remote = (planned_data(configured(f"data.dir={name}"), None) for name in (prepared, URL))
    assert (remote.samples, remote.vocab_size, remote.latent_dim, remote.prepared) == (
        local.samples,
        local.vocab_size,
        local.latent_dim,
        True,
    )
    np.testing.assert_array_equal(remote.lengths, local.lengths)
    train_data = ShardDataset(prepared, "train")
    assert len(train_data.info.shards["train"]) > 2
    for count in (1, 150, 10**6):  # of one shard, of two, of all
        wanted = train_data.lengths(np.arange(min(count, len(train_data))))
        np.testing.assert_array_equal(first_lengths(URL, train_data.info, count), wanted)


def test_data_that_a_plan_cannot_be_made_of_is_refused(store: Any) -> None:
    with pytest.raises(UserError, match=r"data\.dir=memory:///none: no finished dataset there; prepare the data, or"):
        planned_data(configured("data.dir=memory:///none"), None)
    said = planned_data(configured("data.dir=memory:///none", "model.vocab_size=300", "model.latent_dim=8"), 20)
    assert (said.vocab_size, said.samples, said.prepared) == (300, None, False)
    with pytest.raises(UserError, match=r"model\.max_seq_len=4 is shorter than the longest row of memory:///data/mine"):
        planned_data(configured(f"data.dir={URL}", "model.max_seq_len=4"), None)
    name = "/data/mine/train-00001.offsets.npy"
    whole = store.cat(name)
    for damaged in (whole[:200], b"", b"<html>"):
        store.pipe(name, damaged)
        with pytest.raises(UserError, match=r"memory:///data/mine/train-00001\.offsets\.npy: damaged \("):
            planned_data(configured(f"data.dir={URL}"), None)
    store.rm(name)
    with pytest.raises(UserError, match=r"train-00001\.offsets\.npy: missing"):
        planned_data(configured(f"data.dir={URL}"), None)


def test_a_model_is_used_with_data_of_a_store(
    store: Any, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path / "run", prepared, "training.num_train_steps=2", "logging.num_generated=2")
    options = [str(run), "--num-samples", "8", "--json", "--device", "cpu"]
    printed = []
    for data in ([], ["--data", URL, "--cache-dir", str(tmp_path / "cache")]):
        capsys.readouterr()
        assert guarded(partial(evaluate.main, [*options, *data])) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    (copy,) = (tmp_path / "cache").glob("mine-*")
    assert load(run, data=URL, cache_dir=tmp_path / "cache").trained.data == copy
    for wrong, words in (
        (["--data", URL], f"--data {URL} is copied to this machine; name a directory that has room: --cache-dir DIR"),
        (["--cache-dir", "c"], "--cache-dir c has no effect: the data is not the URL of a store"),
        (["--data", "memory:///none", "--cache-dir", "c"], "memory:///none: no finished dataset there"),
    ):
        assert guarded(partial(evaluate.main, [*options, *wrong])) == ExitCode.FAILED
        said = capsys.readouterr().err
        assert words in said
        assert len(said.splitlines()) == 1

"""Texts of remote stores: of fsspec's own in memory, and of S3 as a real server speaks it (make test-remote)."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import TINY, tiny_run

from job import convert, evaluate, plan, prepare
from job.command import guarded
from job.data import preparation
from job.data.cached import local_copy
from job.data.records import records
from job.data.remote import RemoteFile, fetch, find_remote
from job.data.shards import ShardDataset, read_info
from job.data.source_files import difference, entries, refuse_touched
from job.data.sources import find_files, is_of_hub, read_texts
from job.errors import ExitCode, UserError

TEXTS = [f"text {number}, of a store" for number in range(300)]
OPTIONS = ["--vocab-size", "300", "--latent-dim", "4", "--validation-fraction", "0.2"]


def read(source: str) -> list[str]:
    return list(read_texts([source], text_key="text", hf_split="train", split_sentences=False))


@pytest.fixture
def memory() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a store that speaks S3."""
    reason = "needs s3fs and moto: make test-remote"
    pytest.importorskip("s3fs", reason=reason)
    moto = pytest.importorskip("moto.server", reason=reason)
    running = moto.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import s3fs

    names = {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}
    for name, value in names.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    # Not the object that reads: what is written here is news to it.
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.mkdir("bucket")
    yield store
    store.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def fill(store: Any, root: str, directory: Path) -> None:
    """Put the texts into a store, as files of every kind, and the same files into a directory."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    table = ("n,text\n" + "".join(f'1,"{text}"\n' for text in TEXTS)).encode()
    files = {
        "deep/a.jsonl": lines,
        "deep/b.jsonl.gz": gzip.compress(lines),
        "deep/c.jsonl.zst": pa.compress(lines, "zstd", asbytes=True),
        "deep/README.md": b"not meant\n",
        "deep/.older/a.jsonl": lines,
        "d.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
        "e.csv": table,
        "f.tsv.gz": gzip.compress("\n".join(["text", *TEXTS]).encode()),
        "g[1].txt": "\n".join(TEXTS).encode(),
    }
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    pq.write_table(pa.table({"n": list(range(len(TEXTS))), "text": TEXTS}), directory / "h.parquet")
    for path in directory.rglob("*"):
        if path.is_file():
            store.pipe(f"{root}/{path.relative_to(directory)}", path.read_bytes())


def check_every_kind(store: Any, url: str, root: str, directory: Path) -> None:
    fill(store, root, directory)
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            assert read(f"{url}/{path.relative_to(directory)}") == TEXTS, path
    for below in ("deep", "deep/*.jsonl*", "**/*.jsonl*"):
        assert read(f"{url}/{below}") == TEXTS * 3
    names = [str(Path(str(path)).relative_to(directory)) for path in find_files(str(directory))]
    assert [str(file).removeprefix(f"{url}/") for file in find_files(url)] == names
    for wrong in ("none.txt", "none*.txt"):
        with pytest.raises(UserError, match=r"none\*?\.txt: no file there .*see docs: how-to/read-from-a-store"):
            read(f"{url}/{wrong}")


def test_every_kind_of_file_of_a_store(memory: Any, tmp_path: Path) -> None:
    check_every_kind(memory, "memory:///texts", "/texts", tmp_path)


def test_every_kind_of_file_of_s3(s3: Any, tmp_path: Path) -> None:
    check_every_kind(s3, "s3://bucket/texts", "bucket/texts", tmp_path)


def check_changes(store: Any, url: str, path: str) -> None:
    """Two contents of one size."""
    store.pipe(path, b"one\n")
    pattern = url.replace("a.txt", "*.txt")
    before = entries([pattern])
    refuse_touched(before, [pattern])
    assert difference(before, entries([pattern])) is None
    store.pipe(path, b"two\n")
    assert difference(before, entries([pattern])) == f"{url} has changed"
    with pytest.raises(UserError, match=f"{url}: changed while it was read"):
        refuse_touched(before, [pattern])


def test_a_file_of_a_store_that_changes_is_noticed(memory: Any, tmp_path: Path) -> None:
    check_changes(memory, "memory:///a.txt", "/a.txt")
    (tmp_path / "a.txt").write_text("two\n")
    local = entries([str(tmp_path / "a.txt")])
    assert difference(local, entries(["memory:///a.txt"])) == "memory:///a.txt is not where a.txt was read"
    assert difference(entries(["memory:///a.txt"]), local) == f"{tmp_path}/a.txt is not where a.txt was read"


def test_a_file_of_s3_that_changes_is_noticed(s3: Any) -> None:
    check_changes(s3, "s3://bucket/a.txt", "bucket/a.txt")


def test_a_dataset_of_s3_is_the_one_of_local_files(s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(s3, "bucket", tmp_path / "texts")
    local = ["--source", str(tmp_path / "texts" / "deep" / "*.gz"), "--out", str(tmp_path / "local"), *OPTIONS]
    remote = ["--source", "s3://bucket/deep/*.gz", "--out", str(tmp_path / "remote"), *OPTIONS]
    assert prepare.main(local) == prepare.main(remote) == 0
    arrays = sorted(path.name for path in (tmp_path / "local").glob("*.npy"))
    assert len(arrays) == 6
    for name in [*arrays, "tokenizer.json"]:
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes(), name
    assert '"version": ' in (tmp_path / "remote" / "dataset.json").read_text()
    capsys.readouterr()
    assert prepare.main(remote) == 0
    assert "finished already" in capsys.readouterr().out
    s3.pipe("bucket/deep/b.jsonl.gz", gzip.compress(b'{"text": "another one"}\n'))
    assert prepare.main(remote) == ExitCode.FAILED
    said = capsys.readouterr().err
    assert "error: s3://bucket/deep/b.jsonl.gz has changed since" in said
    assert len(said.splitlines()) == 1


def test_a_dataset_of_s3_is_copied(s3: Any, prepared: Path, tmp_path: Path) -> None:
    s3.put(f"{prepared}/", "bucket/data/mine/", recursive=True)
    copy = local_copy("s3://bucket/data/mine", tmp_path)
    ShardDataset(copy, "train", verify_hashes=True)
    assert (copy / "dataset.json").read_bytes() == (prepared / "dataset.json").read_bytes()
    with pytest.raises(UserError, match=r"s3://other/mine: no finished dataset there"):
        local_copy("s3://other/mine", tmp_path)


def test_plan_and_tools_take_data_of_s3(
    s3: Any, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "s3://bucket/data/mine"
    s3.put(f"{prepared}/", "bucket/data/mine/", recursive=True)
    printed = []
    for directory in (str(prepared), url):
        capsys.readouterr()
        assert guarded(partial(plan.main, [*TINY, f"data.dir={directory}", "--json"])) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    run = tiny_run(tmp_path / "run", prepared, "training.num_train_steps=2", "logging.num_generated=2")
    scores = [str(run), "--num-samples", "8", "--json", "--device", "cpu"]
    copied = ["--data", url, "--cache-dir", str(tmp_path / "cache")]
    capsys.readouterr()
    evaluate.main(scores)
    wanted = capsys.readouterr().out
    evaluate.main([*scores, *copied])
    assert capsys.readouterr().out == wanted
    convert.main(["export", str(run), str(tmp_path / "export"), *copied])
    assert (tmp_path / "export" / "tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()
    for command, words in (
        ([*TINY, "data.dir=s3://other/mine"], "data.dir=s3://other/mine: no finished dataset there"),
        ([*TINY, f"data.dir={url}", "model.max_seq_len=4"], f"shorter than the longest row of {url}"),
    ):
        assert guarded(partial(plan.main, command)) == ExitCode.FAILED
        assert words in capsys.readouterr().err


LATENTS = np.random.default_rng(0).standard_normal((len(TEXTS), 6)).astype(np.float32)
FEW = ["--vocab-size", "300", "--validation-fraction", "0.2"]


def check_latents(store: Any, url: str, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts here, latents there: the dataset is the one of local files, and a changed file is noticed."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    for name, array in (("latents.npy", LATENTS), ("more.npy", LATENTS[:25] + 1)):
        np.save(tmp_path / name, array)
        store.pipe(f"{root}/{name}", (tmp_path / name).read_bytes())

    def command(place: str | Path, out: str, *more: str) -> list[str]:
        of_latents = ["--latents", f"{place}/latents.npy", "--unpaired-latents", f"{place}/more.npy"]
        return ["--source", str(tmp_path / "texts.txt"), *of_latents, "--out", str(tmp_path / out), *FEW, *more]

    assert prepare.main(command(tmp_path, "local")) == prepare.main(command(url, "remote")) == 0
    for path in (tmp_path / "local").glob("*"):
        if path.name != "dataset.json":
            assert (tmp_path / "remote" / path.name).read_bytes() == path.read_bytes(), path.name
    local, remote = (read_info(tmp_path / name) for name in ("local", "remote"))
    assert remote.encoder == local.encoder  # its hash too: it is of the content
    assert remote.unpaired == local.unpaired == {"latent": 25}
    assert [entry["name"] for entry in remote.options["source_files"]] == ["texts.txt", "latents.npy", "more.npy"]
    assert not (tmp_path / "remote" / "work").exists()
    capsys.readouterr()
    assert prepare.main(command(url, "remote")) == 0
    assert "finished already" in capsys.readouterr().out
    assert prepare.main(command(url, "remote", "--dry-run")) == 0
    assert "6 dimensions, given" in capsys.readouterr().out
    for name in ("more.npy", "latents.npy"):
        store.pipe(f"{root}/{name}", store.cat(f"{root}/{name}")[:-1] + b"\0")
        assert prepare.main(command(url, "remote")) == ExitCode.FAILED
        assert f"error: {url}/{name} has changed since" in capsys.readouterr().err
    store.rm(f"{root}/latents.npy")
    assert prepare.main(command(url, "another")) == ExitCode.FAILED
    assert f"--latents {url}/latents.npy: no file there that is read" in capsys.readouterr().err
    assert not list((tmp_path / "another").glob("*.npy"))


def test_latents_of_a_store_are_those_of_a_file(
    memory: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_latents(memory, "memory:///latents", "/latents", tmp_path, capsys)


def test_latents_of_s3_are_those_of_a_file(s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_latents(s3, "s3://bucket/latents", "bucket/latents", tmp_path, capsys)


def test_latents_that_cannot_be_had_are_one_line(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        memory.pipe(f"/latents/{name}.npy", b"not numpy's")
    with pytest.raises(UserError, match=r"--latents memory:///latents: 2 files there; name one of them"):
        fetch("memory:///latents", "--latents", tmp_path / "copy.npy")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(UserError, match=r"--latents memory:///latents/a\.npy: its copy needs 0\.0 MB in .* are free"):
        fetch("memory:///latents/a.npy", "--latents", tmp_path / "copy.npy")
    monkeypatch.undo()
    monkeypatch.setattr(type(memory), "open", lambda *_, **__: Breaking())
    with pytest.raises(UserError, match=r"--latents memory:///latents/a\.npy: cannot be read \(the store is gone\)$"):
        fetch("memory:///latents/a.npy", "--latents", tmp_path / "copy.npy")
    assert not list(tmp_path.iterdir())


def test_unpaired_latents_that_change_before_they_are_read_are_refused(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    np.save(tmp_path / "more.npy", LATENTS[:, :4])
    memory.pipe("/more.npy", (tmp_path / "more.npy").read_bytes())
    done = preparation.write_latents

    def meanwhile(*arguments: Any) -> Any:
        memory.pipe("/more.npy", b"another")
        return done(*arguments)

    monkeypatch.setattr(preparation, "write_latents", meanwhile)
    arguments = ["--source", str(tmp_path / "texts.txt"), "--unpaired-latents", "memory:///more.npy", *OPTIONS]
    assert prepare.main([*arguments, "--out", str(tmp_path / "data")]) == ExitCode.FAILED
    assert "memory:///more.npy has changed since" in capsys.readouterr().err
    assert not (tmp_path / "data" / "dataset.json").exists()


def test_what_is_wrong_with_a_store_is_one_line(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--source s3://other/\*: no file there that is read \(or no such bucket\)"):
        read("s3://other/*")
    s3.pipe("bucket/a.txt", b"a text\n")
    (file,) = find_remote("s3://bucket/a.txt", lambda _: True)
    s3.rm("bucket/a.txt")
    with pytest.raises(UserError, match=r"s3://bucket/a\.txt: cannot be read \("):
        list(records(file, ["text"]))
    type(s3).clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(
        UserError, match=r'--source s3://bucket/a\.txt: cannot be read \(.*"http://127\.0\.0\.1:1'
    ) as caught:
        read("s3://bucket/a.txt")
    assert "\n" not in str(caught.value)
    type(s3).clear_instance_cache()
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=r"--source s3://bucket/a\.txt: cannot be read \(.*credentials"):
        read("s3://bucket/a.txt")


def test_a_store_that_nothing_here_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"s3://b/a\.txt: Install s3fs to access S3 \(pip install 'cyclevae\[remote\]'"):
        read("s3://b/a.txt")
    with pytest.raises(UserError, match="nowhere://a: Protocol not known: nowhere"):
        read("nowhere://a")
    with pytest.raises(UserError, match=r"a password in a URL would be written"):
        read("ftp://me:secret@host/a.txt")
    assert not is_of_hub("hf://datasets/a/b")
    assert is_of_hub("hf:a/b")


class Breaking:
    """A file of a store whose connection is lost."""

    def __init__(self) -> None:
        self.left = 1

    def read(self, _: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ConnectionResetError("the store is gone\nand more")
        return b"a text\nhalf a te"

    def close(self) -> None:
        pass


def test_a_lost_connection_is_no_shorter_file(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/a.txt", b"a text\nhalf a text\n")
    monkeypatch.setattr(type(memory), "open", lambda *_, **__: Breaking())
    (file,) = find_remote("memory:///a.txt", lambda _: True)
    assert isinstance(file, RemoteFile)
    with pytest.raises(UserError, match=r"memory:///a\.txt: cannot be read \(the store is gone\)$"):
        list(records(file, ["text"]))

"""Texts through Hugging Face's own library, of directories alone: no network (make test-remote)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job import prepare
from job.data.source_files import difference, entries
from job.data.sources import read_texts
from job.errors import ExitCode, UserError

TEXTS = [f"text {number} of a directory" for number in range(60)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield pytest.importorskip("datasets", reason="needs datasets: make test-remote")


def read(source: str, split: str = "train", key: str = "doc.text") -> list[str]:
    return list(read_texts([source], text_key=key, hf_split=split, split_sentences=False))


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "doc": {"text": text}}) + "\n" for text in texts).encode()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "texts"
    path.mkdir()
    (path / "train-0.jsonl").write_bytes(lines(TEXTS[:20]))
    (path / "train-1.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[20:])))
    (path / "test.jsonl").write_bytes(lines(TEXTS[:3]))
    return path


def test_a_directory_of_files_gives_its_splits(library: Any, directory: Path, tmp_path: Path) -> None:
    assert read(f"hf:{directory}") == TEXTS
    assert read(f"hf:{directory}", "test") == TEXTS[:3]
    with pytest.raises(UserError, match=r"hf:.*texts: cannot be loaded \(Bad split: dev\. Available splits: \['train'"):
        read(f"hf:{directory}", "dev")
    with pytest.raises(UserError, match=r"row 0: no text under the key 'txt', it has n, doc; name the key"):
        read(f"hf:{directory}", key="txt")
    with pytest.raises(UserError, match=r"hf:.*nowhere: cannot be loaded \("):
        read(f"hf:{tmp_path / 'nowhere'}")


def test_parquet_and_what_was_saved_give_the_same_texts(library: Any, tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS, "image": [b"not one"] * len(TEXTS)})
    (tmp_path / "parquet").mkdir()
    pq.write_table(table.slice(0, 30), tmp_path / "parquet" / "train-00000-of-00002.parquet")
    pq.write_table(table.slice(30), tmp_path / "parquet" / "train-00001-of-00002.parquet")
    assert read(f"hf:{tmp_path / 'parquet'}", key="text") == TEXTS
    saved = library.Dataset(table).cast_column("image", library.Image())
    saved.save_to_disk(str(tmp_path / "saved"))
    # The image is none, or the library for images is missing: nobody looks at it.
    assert read(f"hf:{tmp_path / 'saved'}", key="text") == TEXTS


def test_no_more_is_read_than_asked_for(
    library: Any, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last file is damaged, which whoever loads all of it must notice."""
    (directory / "train-2.jsonl").write_bytes(b'{"n": 1, "doc": {"text"\n')
    options = ["--text-key", "doc.text", "--vocab-size", "300", "--latent-dim", "2", "--validation-fraction", "0.2"]
    command = ["--source", f"hf:{directory}", *options]
    assert prepare.main([*command, "--out", str(tmp_path / "some"), "--max-samples", "60"]) == 0
    capsys.readouterr()
    assert prepare.main([*command, "--out", str(tmp_path / "all")]) == ExitCode.FAILED
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: hf:{directory} row 60: cannot be read (")


def test_files_that_change_are_noticed(directory: Path) -> None:
    source = f"hf:{directory}"
    before = entries([source])
    (directory / ".cache").mkdir()
    (directory / ".cache" / "lock").touch()
    assert [entry["name"] for entry in before] == ["test.jsonl", "train-0.jsonl", "train-1.jsonl.gz"]
    assert difference(before, entries([source])) is None
    (directory / "train-0.jsonl").write_bytes(lines(TEXTS[:19]))
    assert difference(before, entries([source])) == f"{directory / 'train-0.jsonl'} has changed"
    assert entries([f"hf:{directory}:config"]) == entries([source])
    assert entries(["hf:name:config"]) == [{"name": "hf:name:config"}]

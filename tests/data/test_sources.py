"""Which files are read, and what is refused in them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.data.records import records
from job.data.sources import find_files, read_texts
from job.errors import UserError


def read(source: Path | str, **options: Any) -> list[str]:
    defaults: dict[str, Any] = {"text_key": "text", "hf_split": "train", "split_sentences": False}
    return list(read_texts([str(source)], **(defaults | options)))


def test_a_directory_gives_the_kinds_of_file_that_the_help_names(tmp_path: Path) -> None:
    names = ["a.txt", "b.jsonl", "c.parquet", "README.md", "dataset_info.json", "d.text", "e.ndjson", "f.csv"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in find_files(str(tmp_path))] == ["a.txt", "b.jsonl", "c.parquet"]
    assert [path.name for path in find_files(str(tmp_path / "*.md"))] == ["README.md"]
    assert find_files(str(tmp_path / "d.text"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file of \.txt, \.jsonl, \.parquet in this directory$"):
        find_files(str(tmp_path / "empty"))
    (tmp_path / "empty" / "f.csv").touch()
    with pytest.raises(UserError, match=r"in this directory; .* named: --source \S*empty/f\.csv$"):
        find_files(str(tmp_path / "empty"))


def test_a_directory_is_read_behind_links_and_without_what_is_hidden(tmp_path: Path) -> None:
    """Large directories lie on other disks; hidden ones hold the older copies of editors."""
    texts, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for directory in (texts / ".ipynb_checkpoints", elsewhere):
        directory.mkdir(parents=True)
        (directory / "b.txt").touch()
    for name in ("a.txt", ".a.txt"):
        (texts / name).touch()
    (texts / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(texts)
    assert [str(path) for path in find_files(str(texts))] == [f"{texts}/a.txt", f"{texts}/linked/b.txt"]
    (texts / "c.txt").symlink_to(tmp_path / "gone.txt")
    for source in (texts, texts / "*.txt"):
        with pytest.raises(UserError, match=r"c\.txt is a link to \S*gone\.txt, which is not there$"):
            find_files(str(source))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json"])
@pytest.mark.parametrize("key", ["text", "in.text"])
def test_records_without_a_text_are_counted(
    tmp_path: Path, name: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [{"text": text} for text in ("one", None, "two")]
    if key == "in.text":
        rows = [*({"in": row} for row in rows), {"in": None}]
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert read(path, text_key=key) == ["one", "two"]
    counted = "1 of 3" if key == "text" else "2 of 4"
    assert f"{name}: {counted} records have no {key} (null)" in capsys.readouterr().err


def test_what_can_be_read_but_once_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no regular file"):
        find_files(str(tmp_path / "pipe"))


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufefffirst\nsecond\n\ufeffthird, of a file that was appended\n")
    assert read(tmp_path / "a.txt") == ["first", "second", "third, of a file that was appended"]
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps({"text": "\ufeffin a record"}) + "\n")
    assert read(tmp_path / "a.jsonl") == ["in a record"]


BAD = {
    "nul.txt": ("fine\na\0b\n", "nul.txt:2: a NUL character"),
    "nul.jsonl": ('{"text": "a\\u0000b"}\n', "nul.jsonl:1: a NUL character"),
    "half.jsonl": ('{"text": "fine"}\n{"text": "a\\ud800b"}\n', r"half.jsonl:2: half of a surrogate pair (\ud800)"),
    "number.jsonl": ('{"text": 5}\n', "number.jsonl:1: the value of 'text' is 5, not a text"),
    "item.json": ('[{"text": "x"}, {"txt": "y"}]', "item.json item 2: no text under the key 'text', it has txt"),
    "cut.json": ('[{"text": "x"}, {"text": "y', "cut.json item 2: not JSON, or cut off"),
    "open.json": ('[{"text": "x"}', "open.json item 1: followed by 'the end of the file', not by a comma or ]"),
    "more.json": ('[{"text": "x"}]\n{}', "more.json: '{' behind the end of the array"),
    "comma.json": ('[{"text": "x"},]', "comma.json item 2: not JSON"),
    "later.jsonl": ('{"text": "x"}\n[{"text": "x"}]\n', "later.jsonl:2: no text under the key 'text', it is a list"),
    "inner.jsonl": ('{"a": {"text": "x"}}\n', "inner.jsonl:1: no text under the key 'text', it has a"),
    "string.jsonl": ('"x"\n', "it is a str"),
    "table.xls": ("a,b\n", "unknown kind of file"),
    "none.csv": ("a,b\n", "none.csv: no column 'text' in its first row, which has a, b"),
    "twice.csv": ("text,text\n", "twice.csv: 2 columns 'text'"),
    "fields.csv": ("text,b\nx,1\ny\n", "fields.csv:3: 1 fields, but the first row names 2 columns"),
    "quotes.tsv": ('text\tb\n"so" he said\t1\n', "quotes.tsv:2: not a tsv table"),
    "plain.txt.gz": ("plain\n", "plain.txt.gz: cannot be decompressed"),
    "plain.txt.zst": ("plain\n", "plain.txt.zst: cannot be decompressed"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_named_by_file_and_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


TEXTS = ["first, with a comma", 'a "quoted" one', "tab\tand é", "two\nlines"]
RECORDS = [{"n": 1, "in": {"a.b": text}} for text in TEXTS]


def table(delimiter: str) -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(
        [["n", "in.a.b"], *([str(n), text] for n, text in enumerate(TEXTS))]
    )
    return file.getvalue()


def compressed(content: bytes, ending: str) -> bytes:
    """In two parts, as files that were joined are."""
    half = len(content) // 2
    packs: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": lambda part: pa.compress(part, "zstd", asbytes=True),
    }
    return packs[ending](content[:half]) + packs[ending](content[half:])


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path, ending: str) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    files = {
        "a.jsonl": lines,
        "array.json": "\ufeff\n" + json.dumps(RECORDS, indent=1) + "\n",
        "short.jsonl": json.dumps(RECORDS),
        "a.csv": "\ufeff" + table(","),
        "a.tsv": table("\t"),
    }
    for name, content in files.items():
        path = tmp_path / (name + ending)
        path.write_bytes(compressed(content.encode(), ending))
        assert read(path, text_key="in.a.b") == TEXTS, path
    pq.write_table(pa.Table.from_pylist([*RECORDS, {"n": 2, "in": None}]), tmp_path / "nested.parquet")
    assert read(tmp_path / "nested.parquet", text_key="in.a.b") == TEXTS
    pq.write_table(pa.table({"in.a.b": TEXTS, "in": [{"a.b": "other"}] * 4}), tmp_path / "flat.parquet")
    assert read(tmp_path / "flat.parquet", text_key="in.a.b") == TEXTS
    (tmp_path / f"empty.json{ending}").write_bytes(compressed(b" [ ] ", ending))
    assert read(tmp_path / f"empty.json{ending}") == []


def test_a_directory_gives_its_compressed_files(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "b.jsonl.zst", "c.parquet.gz", "d.csv.gz", "e.gz"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files(str(tmp_path))] == ["a.txt.gz", "b.jsonl.zst"]


def test_a_file_that_was_cut_off_is_no_shorter_file(tmp_path: Path) -> None:
    for ending in (".gz", ".zst"):
        path = tmp_path / f"cut.txt{ending}"
        path.write_bytes(compressed(b"a text\n" * 1000, ending)[:-4])
        with pytest.raises(UserError, match=f"cut.txt{ending}: cannot be decompressed, damaged or cut off"):
            read(path)


def test_a_file_is_read_no_further_than_it_is_asked_for(tmp_path: Path) -> None:
    """The array has 30 MB, of which the first items are read in a few hundred kilobytes."""
    content = json.dumps([{"text": f"{n} " * 2000} for n in range(3000)]).encode()
    (tmp_path / "large.json.gz").write_bytes(gzip.compress(content, 1))
    tracemalloc.start()
    texts = read_texts([str(tmp_path / "large.json.gz")], text_key="text", hf_split="train", split_sentences=False)
    assert [next(texts)[0] for _ in range(3)] == ["0", "1", "2"]
    texts.close()
    assert sum(1 for _ in records(tmp_path / "large.json.gz", ["text"])) == 3000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2e6


@pytest.mark.parametrize("several", [True, False])
def test_an_unknown_split_of_a_saved_dataset_is_named(
    tmp_path: Path, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rows(list[dict[str, str]]):
        split = "test"

    rows = Rows([{"text": "x"}])
    library = SimpleNamespace(load_from_disk=lambda name: {"test": rows} if several else rows)
    monkeypatch.setitem(sys.modules, "datasets", library)
    (tmp_path / "dataset_info.json").touch()
    source = f"hf:{tmp_path}"
    assert read(source, hf_split="test") == ["x"]
    there = "it has test; give one of them with --hf-split" if several else "it was saved as a single one"
    with pytest.raises(UserError, match=f"{source}: no split 'dev', {there}"):
        read(source, hf_split="dev")

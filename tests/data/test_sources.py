"""Which files are read, and what is refused in them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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
    with pytest.raises(UserError, match=r"no file of \.txt, \.jsonl, \.parquet in this directory"):
        find_files(str(tmp_path / "empty"))


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
    "null.jsonl": ('{"text": null}\n', "null.jsonl:1: the value of 'text' is null, not a text"),
    "array.jsonl": ('[{"text": "x"}]\n', "array.jsonl:1: a JSON array; one object a line is expected"),
    "array.json": ('\n[\n {"text": "x"}\n]\n', "array.json:2: a JSON array"),
    "string.jsonl": ('"x"\n', "it is a str"),
    "table.csv": ("a,b\n", "unknown kind of file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_named_by_file_and_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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

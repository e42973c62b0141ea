"""Whether files are the ones that were read before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from job.data import source_files
from job.data.source_files import contents, difference, entries, left_out, refuse_touched
from job.errors import UserError


def test_files_are_known_by_content_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").write_text("two\n")
    before = entries([str(tmp_path), "stdlib", "hf:name:config"])
    assert contents(before)[2:] == [{"name": "stdlib"}, {"name": "hf:name:config"}]
    monkeypatch.chdir(tmp_path)
    again = entries(["a.txt", "./b.txt", "stdlib", "hf:name:config"])
    assert difference(before, again) is None
    assert difference(contents(before), again) is None
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    assert difference(before, entries(["c.txt", "b.txt", "stdlib", "hf:name:config"])) is None
    assert "is not b.txt" in str(difference(before, entries(["c.txt", "c.txt", "stdlib", "hf:name:config"])))
    assert "3 sources instead of 4" in str(difference(before, entries(["c.txt", "b.txt", "stdlib"])))
    (tmp_path / "b.txt").write_text("to0\n")  # of the same size
    assert f"{tmp_path}/b.txt has changed" == difference(before, entries(["c.txt", "b.txt", "stdlib"]))


def test_what_was_not_touched_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    known = entries([str(path)])
    refuse_touched(known, [])
    monkeypatch.setattr(source_files, "hashlib", None)
    assert entries([str(path)], known) == known
    os.utime(path, ns=(1, 1))
    with pytest.raises(AttributeError):
        entries([str(path)], known)
    with pytest.raises(UserError, match=r"a\.txt: changed while it was read"):
        refuse_touched(known, [])


def test_what_a_directory_holds_and_is_not_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts" / ".git").mkdir(parents=True)
    (tmp_path / "texts" / "read.txt").write_text("one\n")
    assert left_out(["texts/", "stdlib", "texts/read.txt"]) == []
    for name in ("b.csv", "a.csv.gz", ".git/HEAD"):
        (tmp_path / "texts" / name).write_text("text\none\n")
    (line,) = left_out(["texts/"])
    assert line.startswith("texts/: left out a.csv.gz, b.csv; of a directory .txt, .jsonl, .parquet are read")
    assert line.endswith("beside it: texts/ texts/a.csv.gz")
    (line,) = left_out(["texts", "texts/a.csv.gz"])
    assert "left out b.csv;" in line, "what is named is read"
    for number in range(5):
        (tmp_path / "texts" / f"c{number}.md").write_text("text\n")
    (line,) = left_out(["texts/"])
    assert "a.csv.gz, b.csv, c0.md and 4 more;" in line

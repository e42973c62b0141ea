"""Latents that came with the texts, and the preview of a preparation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job import prepare
from job.data.description import describe_dataset, refuse_other_data
from job.data.encoders import load_encoder
from job.data.shards import SPLITS, ShardDataset, read_info
from job.data.tokenizer import of_dataset
from job.errors import UserError

OPTIONS = ["--vocab-size", "300", "--validation-fraction", "0.2", "--shard-size", "32", "--max-length", "20"]
COUNT = 120
LONG = "a text that is much longer than what --max-length lets pass " * 4
TEXTS = [*(f"text number {n}" for n in range(COUNT)), "", "TEXT  number 3", "its latent is zero", LONG]
LATENTS = np.random.default_rng(0).standard_normal((len(TEXTS), 6)).astype(np.float32)
LATENTS[-2] = 0


def run(*options: str | Path) -> int:
    return prepare.main([*map(str, options), *OPTIONS])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts and latents in every way of giving them; the last is prepared."""
    path = tmp_path_factory.mktemp("given")
    (path / "texts.txt").write_text("\n".join(TEXTS))
    np.save(path / "latents.npy", LATENTS.astype(np.float64))
    records: list[dict[str, Any]] = [
        {"text": text, "of": {"latent": latent.tolist()}} for text, latent in zip(TEXTS, LATENTS, strict=True)
    ]
    (path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records), path / "records.parquet")
    assert run("--source", path / "texts.txt", "--latents", path / "latents.npy", "--out", path / "file") == 0
    return path


def pairs(data: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for split in SPLITS:
        rows = ShardDataset(data, split, verify_hashes=True)
        tokenizer = of_dataset(data, rows.info)
        assert tokenizer
        found |= {tokenizer.decode(rows[i][0]): rows[i][1].tolist() for i in range(len(rows))}
    return found


def test_each_text_keeps_its_own_latent(directory: Path) -> None:
    wanted = {text: latent.tolist() for text, latent in zip(TEXTS[:COUNT], LATENTS, strict=False)}
    assert pairs(directory / "file") == wanted
    info = read_info(directory / "file")
    digest = hashlib.sha256((directory / "latents.npy").read_bytes()).hexdigest()
    assert info.encoder == {"name": "given", "file": "latents.npy", "sha256": digest}
    made = info.options
    assert (made["duplicates"], made["dropped"], made["without_latent"]) == (1, 1, 1)
    assert not (directory / "file" / "work").exists()
    for name in ("records.jsonl", "records.parquet"):
        out = directory / f"of_{name}"
        assert run("--source", directory / name, "--latents-key", "of.latent", "--out", out) == 0
        assert pairs(out) == wanted
        for shard in (directory / "file").glob("*.npy"):  # split and order are those of the texts
            assert shard.read_bytes() == (out / shard.name).read_bytes()


def test_fewer_samples_keep_their_latents_and_the_count_is_still_checked(directory: Path, tmp_path: Path) -> None:
    source = ("--source", directory / "texts.txt", "--max-samples", "50")
    assert run(*source, "--latents", directory / "latents.npy", "--out", tmp_path / "file") == 0
    assert (
        run(
            *source[:1], directory / "records.jsonl", *source[2:], "--latents-key", "of.latent", "--out", tmp_path / "k"
        )
        == 0
    )
    wanted = {text: latent.tolist() for text, latent in zip(TEXTS[:50], LATENTS, strict=False)}
    assert pairs(tmp_path / "file") == pairs(tmp_path / "k") == wanted
    np.save(tmp_path / "more.npy", np.concatenate([LATENTS, LATENTS[:1]]))
    assert run(*source, "--latents", tmp_path / "more.npy", "--out", tmp_path / "more") == 1


def test_a_changed_file_of_latents_is_refused(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ("--source", directory / "texts.txt", "--out", directory / "file", "--latents")
    assert run(*source, directory / "latents.npy") == 0
    assert "finished already" in capsys.readouterr().out
    np.save(tmp_path / "latents.npy", LATENTS + 1)
    assert run(*source, tmp_path / "latents.npy") == 1
    assert "latents.npy has changed since" in capsys.readouterr().err


def test_other_given_latents_fit_a_model_with_a_note(directory: Path) -> None:
    train = ShardDataset(directory / "file", "train")
    model = describe_dataset(train, standardize=True)
    assert refuse_other_data(model, train.info, ("a", "b")) == []
    other = dataclasses.replace(train.info, encoder={**train.info.encoder, "sha256": "0" * 64})
    (note,) = refuse_other_data(model, other, ("the model", "the data"))
    assert note.startswith("the latents of the data and of the model were given in different files")
    with pytest.raises(UserError, match="another encoder"):
        refuse_other_data(model, dataclasses.replace(other, encoder={"name": "lsa"}), ("a", "b"))


def test_what_needs_an_encoder_says_that_there_is_none(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = directory / "file"
    with pytest.raises(UserError, match=r"given with the texts \(latents\.npy\), so there is no encoder"):
        load_encoder(data, read_info(data).encoder)
    assert prepare.main(["--like", str(data), "--out", str(tmp_path / "x"), "--source", "unicode"]) == 1
    error = capsys.readouterr().err
    assert "its latents were given with the texts" in error
    assert error.count("\n") == 1


def changed(row: int, value: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"text": f"text {n}", "v": [n, 1.5]} for n in range(40)]
    records[row]["v"] = value
    return records


BAD: dict[str, tuple[Any, str]] = {
    "fewer rows": (LATENTS[:-1], "fewer rows.npy: 123 rows, so none for text 124"),
    "more rows": (
        np.zeros((125, 6)),
        "125 rows, but the sources have 124 texts (1 of them empty), so row 125 has none",
    ),
    "not finite": (np.where(np.arange(124)[:, None] == 7, np.nan, LATENTS), "row 8 (index 7) holds a number that is"),
    "too large": (np.full((124, 6), 1e300), "row 1 (index 0) holds a number that is not finite in 32 bits"),
    "flat": (LATENTS[:, 0], "float32 of shape [124], not numbers of [rows, dimensions]"),
    "words": (LATENTS.astype(str), "of shape [124, 6], not numbers"),
    "width": (
        changed(5, [1, 2, 3]),
        "width.jsonl:6: the value of 'v' is a list of 3 numbers, but those before it have",
    ),
    "nan": (changed(5, [1, float("nan")]), "nan.jsonl:6: the value of 'v' is not finite"),
    "text": (changed(5, ["1", "2"]), "text.jsonl:6: the value of 'v' is not a list of numbers"),
    "ragged": (changed(5, [[1], 2]), "ragged.jsonl:6: the value of 'v' is not a list of numbers"),
    "null": (changed(5, None), "null.jsonl:6: the value of 'v' is not a list of numbers"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("dry", [True, False])
def test_bad_latents_are_named_by_file_and_row(
    directory: Path, tmp_path: Path, name: str, dry: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = BAD[name]
    if isinstance(content, list):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in content))
        options: list[str | Path] = ["--source", tmp_path / f"{name}.jsonl", "--latents-key", "v"]
    else:
        np.save(tmp_path / f"{name}.npy", content)
        options = ["--source", directory / "texts.txt", "--latents", tmp_path / f"{name}.npy"]
    assert run(*options, "--out", tmp_path / "out", *(["--dry-run"] if dry else [])) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("count", [124, 1])
def test_equal_latents_are_warned_of(
    directory: Path, tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = np.ones((len(TEXTS), 6))
    latents[count:, 3] = 2  # the last of several thousand rows may be the one that differs
    np.save(tmp_path / "latents.npy", latents)
    records = [{"text": text, "v": latent.tolist()} for text, latent in zip(TEXTS, latents, strict=True)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for options in (
        ("--source", directory / "texts.txt", "--latents", tmp_path / "latents.npy"),
        ("--source", tmp_path / "records.jsonl", "--latents-key", "v"),
    ):
        assert run(*options, "--dry-run") == 0
        said = capsys.readouterr().err
        named = f"warning: {' '.join(map(str, options[2:]))}: all latents are equal, so a model can learn nothing"
        assert (named in said) == (count == 124)


@pytest.mark.parametrize("name", ["records.jsonl", "records.parquet", "texts.txt", "table.csv"])
def test_a_missing_latent_is_asked_for_by_its_own_option(
    directory: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "table.csv").write_text("text\nx\n")
    assert run("--source", directory / name, "--latents-key", "of.other", "--dry-run") == 1
    error = capsys.readouterr().err
    assert name in error
    assert "'of.other'" in error
    assert "with --latents-key" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--latents a.npy --latents-key b", "leave one out"),
        ("--latents a.npy --encoder lsa", "--encoder has no effect with --latents"),
        ("--latents a.npy --latent-dim 3", "--latent-dim has no effect with latents that are given"),
        ("--latents a.npy --split-sentences", "--split-sentences: --latents gives a latent for a whole text"),
        ("", "--out DIR is missing"),
    ],
)
def test_options_that_do_not_go_together(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(options.split()) == 2
    assert message in capsys.readouterr().err


def test_a_preview_counts_as_the_preparation_does_and_writes_nothing(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = ("--tokenizer", directory / "file" / "tokenizer.json", "--dry-run", "--max-length", "20")
    for given in (
        ("--source", directory / "texts.txt", "--latents", directory / "latents.npy"),
        ("--source", directory / "records.parquet", "--latents-key", "of.latent"),
    ):
        assert prepare.main([*map(str, (*given, *tokenizer)), "--out", "data"]) == 0
        shown = capsys.readouterr().out
        assert "123 texts read, 122 different ones; nothing was written" in shown
        assert "dropped      1 duplicates, 1 longer than --max-length 20, 1 whose latent is zero, 1 empty" in shown
        assert f"longest {len(LONG.strip())}" in shown
        assert "6 dimensions, given" in shown
        assert shown.count("for example") == 5
    assert run("--source", directory / "texts.txt", "--dry-run") == 0
    assert "not known before the tokenizer is trained" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

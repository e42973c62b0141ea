"""`--like`: new data with the tokenizer and the encoder of what there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from job import prepare
from job.data.description import describe_dataset, write_model_files
from job.data.encoders import ENCODER_FILE, load_encoder
from job.data.shards import ShardDataset
from job.data.tokenizer import TOKENIZER_FILE, of_dataset


@pytest.fixture
def new_texts(corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "new.txt"
    path.write_text("\n".join(f"{line} And then, at last, number {n}." for n, line in enumerate(corpus.open())))
    return path


def like(source: Path, out: Path, texts: Path, *options: str) -> int:
    command = ["--like", str(source), "--out", str(out), "--source", str(texts), "--validation-fraction", "0.3"]
    return prepare.main([*command, *options])


def test_new_texts_get_that_tokenizer_and_encoder(prepared: Path, new_texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert like(prepared, out, new_texts) == 0
    for name in (TOKENIZER_FILE, ENCODER_FILE):
        assert (out / name).read_bytes() == (prepared / name).read_bytes()
    old, new = ShardDataset(prepared, "train"), ShardDataset(out, "train", verify_hashes=True)
    assert new.info.encoder == old.info.encoder
    assert new.info.options["max_length"] == old.info.options["max_length"]
    assert new.info.options["like"] == str(prepared)
    tokenizer = of_dataset(out, new.info)
    assert tokenizer
    texts = [tokenizer.decode(new[index][0]) for index in range(20)]
    expected = load_encoder(prepared, old.info.encoder).encode(texts)
    assert np.array_equal(np.stack([new[index][1] for index in range(20)]), expected)


def test_a_run_and_an_export_carry_both(prepared: Path, new_texts: Path, tmp_path: Path) -> None:
    run, export = tmp_path / "run", tmp_path / "export"
    description = describe_dataset(ShardDataset(prepared, "train"), standardize=True)
    for directory in (run / "model", export):
        write_model_files(directory, description, [prepared])
    assert like(prepared, tmp_path / "data", new_texts, "--max-length", str(description.max_length)) == 0
    for source in (run, run / "checkpoints" / "step_00000004", export):
        out = tmp_path / "out" / source.name
        assert like(source, out, new_texts) == 0
        for name in (TOKENIZER_FILE, ENCODER_FILE, "train-00000.tokens.npy", "train-00000.latents.npy"):
            assert (out / name).read_bytes() == (tmp_path / "data" / name).read_bytes()


def test_the_same_again_is_known_by_content(
    prepared: Path, new_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    assert like(prepared, out, new_texts) == 0
    shutil.copytree(prepared, copy)
    assert like(copy, out, new_texts) == 0
    assert "finished already" in capsys.readouterr().out
    other = json.loads((copy / "dataset.json").read_text())
    other["encoder"]["sha256"] = "0" * 64
    (copy / "dataset.json").write_text(json.dumps(other))
    assert like(copy, out, new_texts) == 1
    assert "was prepared with another encoder than that of --like" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--tokenizer train", "--vocab-size 300", "--encoder lsa", "--latent-dim 8", "--mask-token x"]
)
def test_what_it_settles_is_refused(
    prepared: Path, new_texts: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert like(prepared, tmp_path / "out", new_texts, *option.split()) == 2
    assert f"{option.split()[0]} has no effect with --like" in capsys.readouterr().err


def test_what_has_no_encoder_or_tokenizer_is_refused(
    prepared: Path, new_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(prepared, copy)
    info = json.loads((copy / "dataset.json").read_text())
    (copy / ENCODER_FILE).unlink()
    for changes, message in (
        ({}, "encoder.safetensors: missing"),
        ({"encoder": {"name": "lgdlm"}}, "were not made by prepare (lgdlm)"),
        ({"tokenizer": None}, "came without a tokenizer"),
    ):
        (copy / "dataset.json").write_text(json.dumps(info | changes))
        assert like(copy, out, new_texts) == 1
        error = capsys.readouterr().err.splitlines()
        assert message in error[-1]
        assert not out.exists()
    assert like(tmp_path, out, new_texts) == 1
    assert f"{tmp_path}: no run, exported model or prepared dataset" in capsys.readouterr().err

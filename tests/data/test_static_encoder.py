"""Static models of model2vec: a real one, tiny, made of a tokenizer and a random table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import tiny_run
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from job import api, prepare
from job.data.encoders import Resources, load_encoder
from job.data.like import read_pattern
from job.data.shards import ShardDataset, read_info
from job.data.static_encoder import Model2VecEncoder
from job.data.tokenizer import of_dataset
from job.errors import ExitCode, UserError
from job.similarity import re_encoded

model2vec = pytest.importorskip("model2vec", reason="needs model2vec: pip install 'cyclevae[model2vec]'")

KNOWN = (
    "the parser a client server this module every test cache an iterator compiler thread socket returns reads closes "
    "checks copies prints sorts opens first line new file each value whole message all names empty list last record "
    "long string of text ."
)
WORDS = sorted(set(KNOWN.split()))
TABLE = np.random.default_rng(0).standard_normal((len(WORDS) + 1, 12)).astype(np.float32)
OPTIONS = ["--vocab-size", "300", "--validation-fraction", "0.2", "--shard-size", "100", "--encoder", "model2vec"]


def save(directory: Path, table: np.ndarray = TABLE, *, lower: bool = True, **options: Any) -> Path:
    """A static model of WORDS; token 0 is what is no word of these."""
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(["[UNK]", *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    model2vec.StaticModel(table, tokenizer, **options).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("static") / "model")


@pytest.fixture(scope="module")
def data(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "static"
    assert prepare.main([*command(corpus, model, out), "--normalize"]) == 0
    return out


def command(corpus: Path, model: Path, out: Path) -> list[str]:
    return ["--source", str(corpus), *OPTIONS, "--encoder-model", str(model), "--out", str(out)]


def arrays(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*") if path.is_file()}


def vectors(text: str) -> np.ndarray:
    return TABLE[[WORDS.index(word) + 1 for word in text.split() if word in WORDS]]


def test_a_latent_is_the_mean_of_its_tokens_and_of_no_other_text(model: Path) -> None:
    encoder = Model2VecEncoder(str(model), None)
    texts = [
        "The PARSER reads a zebra",
        *(" ".join(WORDS[: n + 1]) for n in range(20)),
        "zebra",
        "the " * 600 + "parser " * 300,
    ]
    assert encoder.encode([]).shape == (0, encoder.encode(texts[:1]).shape[1])
    latents = encoder.encode(texts)
    assert latents.dtype == np.float32
    for text, latent in zip(texts, latents, strict=True):
        if text != "zebra":
            np.testing.assert_allclose(latent, vectors(text.lower()).mean(0), atol=1e-6)
        assert np.array_equal(encoder.encode([text])[0], latent)  # the same bits alone
    assert not latents[texts.index("zebra")].any()
    mean = vectors("the parser").mean(0)
    unit = Model2VecEncoder(str(model), None, normalize=True)
    np.testing.assert_allclose(unit.encode(["the parser"])[0], mean / np.linalg.norm(mean), atol=1e-6)
    short = Model2VecEncoder(str(model), 5)
    np.testing.assert_allclose(short.encode(["the parser"])[0], mean[:5], atol=1e-6)


def test_a_dataset_says_of_what_model_it_is_and_holds_its_latents(data: Path, model: Path) -> None:
    rows = ShardDataset(data, "train", verify_hashes=True)
    described = rows.info.encoder
    assert described.pop("sha256")
    directory = str(model.resolve())
    assert described == {
        "name": "model2vec",
        "model": str(model),
        "truncate_dim": None,
        "normalize": True,
        "directory": directory,
    }
    tokenizer = of_dataset(data, rows.info)
    assert tokenizer
    texts = [tokenizer.decode(rows[index][0]) for index in range(50)]
    latents = load_encoder(data, read_info(data).encoder).encode(texts)
    assert np.array_equal(latents, np.stack([rows[index][1] for index in range(50)]))
    np.testing.assert_allclose(np.linalg.norm(latents, axis=1), 1, atol=1e-6)


def test_several_processes_and_a_killed_one_give_the_same_bits(
    data: Path, corpus: Path, model: Path, tmp_path: Path
) -> None:
    def start(out: Path, rank: int, world_size: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": str(rank + 1)}
        arguments = [*command(corpus, model, out), "--normalize"]
        return subprocess.Popen([sys.executable, "-m", "job.prepare", *arguments], env=environment)

    processes = [start(tmp_path / "two", rank, 2) for rank in range(2)]
    killed = start(tmp_path / "killed", 0, 2)  # waits for the other one's shards when its own are done
    assert [process.wait(120) for process in processes] == [0, 0]
    while not list((tmp_path / "killed" / "work").glob("train-00002.record.json")):
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    assert prepare.main([*command(corpus, model, tmp_path / "killed"), "--normalize"]) == 0
    assert arrays(tmp_path / "two") == arrays(tmp_path / "killed") == arrays(data)


def test_another_model_under_the_name_is_refused(model: Path, tmp_path: Path) -> None:
    path = shutil.copytree(model, tmp_path / "model")
    described = Model2VecEncoder(str(path), None).description
    again = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(again, indent=4))  # as another version of tokenizers writes it
    load_encoder(tmp_path, described)
    other = TABLE.copy()
    other[3, 3] += 1
    for change in ({"table": other}, {"lower": False}, {"normalize": True}, {"weights": np.full(len(TABLE), 2.0)}):
        shutil.rmtree(path)
        save(path, **change)
        with pytest.raises(UserError, match="model: not the encoder that made the latents"):
            load_encoder(tmp_path, described)
    assert Model2VecEncoder(str(model), 5).description["sha256"] != described["sha256"]
    shutil.rmtree(path)
    with pytest.raises(UserError, match=r"--encoder-model .*model: cannot be loaded \("):
        load_encoder(tmp_path, described, Resources(local_files_only=True))


def test_new_texts_are_encoded_like_the_old_ones(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = read_pattern(str(data)).options()
    assert (options["encoder"], options["encoder_model"], options["normalize"]) == ("model2vec", str(model), True)
    (tmp_path / "texts.txt").write_text("\n".join(f"{word} the file" for word in WORDS))
    like = ["--like", str(data), "--source", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "new")]
    assert prepare.main([*like, "--validation-fraction", "0.3"]) == 0
    assert read_info(tmp_path / "new").encoder == read_info(data).encoder
    (tmp_path / "texts.txt").write_text("\n".join(f"zebra {'x' * n}" for n in range(40)))
    like[-1] = str(tmp_path / "unknown")
    assert prepare.main([*like, "--validation-fraction", "0.3"]) == ExitCode.FAILED
    said = capsys.readouterr().err
    assert "at zero: its model knows no token of these texts; take a model of their language" in said


def test_a_trained_model_needs_the_static_one_for_true_latents_alone(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "run", data, "training.num_train_steps=2", "logging.num_generated=2")
    trained = api.load(run, device="cpu")
    found = re_encoded(trained, 8, 8)
    assert found["text/re_encoded_cos"] == pytest.approx(1, abs=1e-4)
    monkeypatch.setitem(sys.modules, "model2vec", None)
    assert trained.encode(["the parser reads the first line."]).shape == (1, 12)
    with pytest.raises(UserError, match="the Python package model2vec is not installed: pip install model2vec"):
        api.load(run, device="cpu").encoder()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--encoder-prompt x", "--encoder-prompt has no effect with --encoder model2vec"),
        ("--encoder-dtype float16", "--encoder-dtype has no effect with --encoder model2vec"),
        ("--encoder-batch-size 8", "--encoder-batch-size has no effect with --encoder model2vec"),
        ("--encoder-device cpu", "--encoder-device has no effect with --encoder model2vec"),
        ("--latent-dim 8", "--latent-dim has no effect with --encoder model2vec"),
        ("--truncate-dim 13", "has only 12 dimensions; give fewer or leave it out"),
    ],
)
def test_what_a_static_model_does_not_have_is_refused(
    corpus: Path, model: Path, tmp_path: Path, options: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main([*command(corpus, model, tmp_path / "out"), *options.split()]) != 0
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


def test_a_model_must_be_named_and_be_there(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["--source", str(corpus), *OPTIONS, "--out", str(tmp_path / "out")]) == ExitCode.USAGE
    assert "--encoder model2vec needs --encoder-model NAME or DIRECTORY" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert prepare.main(command(corpus, tmp_path / "empty", tmp_path / "out")) == ExitCode.FAILED
    assert f"--encoder-model {tmp_path / 'empty'}: cannot be loaded (" in capsys.readouterr().err

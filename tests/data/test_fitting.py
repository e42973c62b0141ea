"""What trains the tokenizer and the encoder of a dataset."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from job import prepare
from job.data.encoders import ENCODER_FILE
from job.data.fitting import train_tokenizer
from job.errors import UserError

OPTIONS = ["--vocab-size", "300", "--latent-dim", "8", "--validation-fraction", "0.2", "--shard-size", "100"]


def test_a_line_that_is_dropped_trains_nothing(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    lines = corpus.read_text().splitlines()
    (tmp_path / "a.txt").write_text("\n".join([*lines, "xyzzy plugh " * 60]) + "\n")
    assert prepare.main(["--out", str(tmp_path / "out"), "--source", str(tmp_path / "a.txt"), *OPTIONS]) == 0
    names = {path.name for path in prepared.iterdir()} - {"dataset.json"}
    assert {"tokenizer.json", ENCODER_FILE, "train-00000.latents.npy"} <= names
    same = {name for name in names if (prepared / name).read_bytes() == (tmp_path / "out" / name).read_bytes()}
    # The long line has a place in one shard of text, whose last text is in the next shard now.
    assert {"tokenizer.json", ENCODER_FILE} <= same


def test_the_tokenizer_drops_none_of_the_texts_that_trained_it() -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(1, 9))) for _ in range(300)]
    texts = [" ".join(generator.choices(words, k=generator.randint(1, 12))) for _ in range(500)]
    tokenizer, kept = train_tokenizer(texts, 320, max_length=16)
    assert 100 < len(kept) < len(texts)
    assert max(map(len, tokenizer.encode(list(kept)))) <= 16
    with pytest.raises(UserError, match="every text is longer than --max-length 1 "):
        train_tokenizer(["two words", "three of them"], 320, max_length=1)


def test_text_without_spaces_is_refused_by_lsa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = random.Random(0)
    characters = [chr(0x4E00 + number) for number in range(200)]
    lines = ["".join(generator.choices(characters, k=12)) for _ in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    assert prepare.main(["--out", str(tmp_path / "out"), "--source", str(tmp_path / "a.txt"), *OPTIONS]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "latents of the validation split at zero" in error
    assert "use --encoder sentence_transformers" in error
    assert not (tmp_path / "out").exists()


def test_a_few_texts_without_a_known_word_are_dropped_and_told(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = corpus.read_text().splitlines()
    (tmp_path / "a.txt").write_text("\n".join([*lines, "?! ...", "***", "- - -"]))
    assert prepare.main(["--out", str(tmp_path / "out"), "--source", str(tmp_path / "a.txt"), *OPTIONS]) == 0
    printed = capsys.readouterr().out
    assert "1 duplicates, 0 longer than --max-length 48, 3 of which the encoder knows no word" in printed
    numbers = [int(word) for word in printed.split(": ")[1].split() if word.isdigit()]
    assert sum(numbers[:2]) == 640

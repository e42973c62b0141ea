"""Tokenizers, trained and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from job.data import tokenizer
from job.errors import UserError

CORPUS = ["The quick brown fox jumps over the lazy dog.", "A dog and a fox are animals, as everyone knows."] * 20


def test_a_trained_tokenizer_loses_nothing(tmp_path: Path) -> None:
    trained = tokenizer.train(CORPUS, 300)
    (tmp_path / "tokenizer.json").write_text(trained.to_json())
    loaded = tokenizer.load(str(tmp_path))
    assert (loaded.vocab_size, loaded.mask_token_id, loaded.pad_token_id) == (300, 1, 0)
    for text in ("The lazy fox.", "Ünïcode, \t [MASK] and [PAD] \U0001f600!"):
        (ids,) = loaded.encode([text])
        assert loaded.decode(ids) == text
        assert not {0, 1} & set(ids.tolist())
        assert np.array_equal(ids, trained.encode([text])[0])


def test_training_is_deterministic() -> None:
    assert len({tokenizer.train(CORPUS, 290).to_json() for _ in range(3)}) == 1


def words(tmp_path: Path, *special: str) -> Path:
    made = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate([*special, "dog", "fox", "?"])}, unk_token="?")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(list(special))
    made.enable_padding(length=9)
    made.enable_truncation(1)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_rows_are_neither_padded_nor_cut(tmp_path: Path) -> None:
    loaded = tokenizer.load(str(words(tmp_path, "[MASK]", "[PAD]")))
    assert loaded.encode(["dog fox dog"])[0].tolist() == [2, 3, 2]


def test_special_tokens_are_found_or_named(tmp_path: Path) -> None:
    directory = words(tmp_path, "@mask", "@pad")
    with pytest.raises(UserError, match=r"no mask token .*--mask-token"):
        tokenizer.load(str(directory))
    with pytest.raises(UserError, match="no pad token"):
        tokenizer.load(str(directory), mask_token="@mask")
    assert tokenizer.load(str(directory), mask_token="@mask", pad_token="@pad").pad_token_id == 1
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"mask_token": {"content": "@mask"}, "pad_token": "@pad"})
    )
    assert tokenizer.load(str(directory / "tokenizer.json")).mask_token_id == 0


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "not a tokenizer"), (None, "no tokenizer.json in this directory")]
)
def test_a_bad_tokenizer_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        tokenizer.load(str(tmp_path))


def test_unknown_tokens_are_known_as_such(tmp_path: Path) -> None:
    loaded = tokenizer.load(str(words(tmp_path, "[MASK]", "[PAD]")))
    assert loaded.unknown_token_id == 4
    assert loaded.encode(["dog cat fox"])[0].tolist() == [2, 4, 3]
    assert tokenizer.train(CORPUS, 300).unknown_token_id is None
    made = Tokenizer(models.WordLevel({"[MASK]": 0, "[PAD]": 1, "dog": 2}, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"cannot encode these texts \(.*\[UNK\]"):
        tokenizer.load(str(tmp_path)).encode(["cat"])


def test_one_token_cannot_be_mask_and_padding(tmp_path: Path) -> None:
    directory = words(tmp_path, "[MASK]", "[PAD]")
    with pytest.raises(UserError, match=r"\[PAD\] is both mask and padding token"):
        tokenizer.load(str(directory), mask_token="[PAD]")

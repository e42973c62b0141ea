"""Tokenizers, encoders and the embedded corpus."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tokenizers import Tokenizer, models, pre_tokenizers

from job.data import tokenizer
from job.data.encoders import LsaEncoder
from job.data.optional import import_optional
from job.data.stdlib_text import is_english, sentences, stdlib_sentences
from job.errors import UserError

DOCUMENTATION = """Return the *absolute* path of a file.

    The ``mode`` argument is ignored by :class:`~os.PathLike` objects,
    e.g. those of a package.  It may be None; see `open' too.

    Arguments:
      - name: The name of the file to be opened.
      * buffer -- How many bytes are read at once.

    Example::

        path = absolute("x")  # This line is code and has to go.

    >>> absolute("This is a call of it.")
    'This is its result, not a sentence.'
    """


def test_sentences_are_cleaned_of_markup_and_code() -> None:
    assert [sentence for sentence in sentences(DOCUMENTATION) if is_english(sentence)] == [
        "Return the absolute path of a file.",
        "The mode argument is ignored by os.PathLike objects, e.g. those of a package.",
        "It may be None; see open too.",
        "The name of the file to be opened.",
        "How many bytes are read at once.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Too short.",
        "x = f(y) is what it returns for {this}.",
        "1234 5678 9012 to the 3456 7890.",
        "GET PUT POST HEAD.",
        "This is " + "very " * 60 + "long.",
        "An unfinished thought of the",
        "and begins in the middle of one.",
    ],
)
def test_what_is_not_a_plain_sentence_is_left_out(text: str) -> None:
    assert not is_english(text)


def test_the_standard_library_gives_tens_of_thousands_of_sentences_unimported() -> None:
    before = set(sys.modules)
    found = list(stdlib_sentences())
    assert not {"antigravity", "this", "turtle", "idlelib"} & (set(sys.modules) - before)
    assert len(set(found)) > 20_000
    assert sum("the" in text.split() for text in found) > 0.3 * len(found)


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


def test_lsa_is_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{number}" for number in rng.zipf(1.3, size=12) % 4000) for _ in range(4000)]
    latents = []
    for threads in (2, 1):
        with threadpool_limits(threads):
            encoder = LsaEncoder.fit(texts, 64, seed=1)
            with (tmp_path / "encoder").open("wb") as file:
                encoder.save(file)
            latents.append(LsaEncoder.load(tmp_path / "encoder").encode(texts))
            # A shard's latents do not depend on what else is encoded with it.
            assert np.array_equal(latents[-1][700:703], encoder.encode(texts[700:703]))
    assert np.array_equal(latents[0], latents[1])
    assert latents[0].dtype == np.float32


def test_a_missing_library_names_the_command() -> None:
    assert importlib.util.find_spec("no_such_library") is None
    with pytest.raises(UserError, match="pip install no-such-library"):
        import_optional("no_such_library", "no-such-library")

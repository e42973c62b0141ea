"""Which texts are kept, and on which side of the split."""

from __future__ import annotations

from collections.abc import Iterator

from job.data.splitting import split_texts


def test_the_split_depends_on_the_words_alone() -> None:
    sentences = [f"Sentence number {number} of many." for number in range(400)]
    few, _ = split_texts(sentences[:200], None, 0.3)
    many, duplicates = split_texts([text.upper() + " " for text in reversed(sentences)] + sentences, None, 0.3)
    assert duplicates == 400
    assert {text.upper() for text in few["validation"]} <= {text.strip() for text in many["validation"]}


def test_any_prefix_of_a_split_is_a_random_sample() -> None:
    """Texts sorted at their source come out mixed."""
    texts = [f"first half, text {number}" for number in range(500)] + [
        f"second half, {number}" for number in range(500)
    ]
    splits, _ = split_texts(texts, None, 0.1)
    of_first_half = sum(text.startswith("first") for text in splits["train"][:200])
    assert 70 < of_first_half < 130


def test_no_more_texts_are_read_than_wanted() -> None:
    def texts() -> Iterator[str]:
        yield from ("one", "ONE ", "two")
        raise AssertionError("read on")

    splits, duplicates = split_texts(texts(), 2, 0.5)
    assert sorted(splits["train"] + splits["validation"]) == ["one", "two"]
    assert duplicates == 1

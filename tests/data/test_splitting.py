"""Which texts are kept, and on which side of the split."""

from __future__ import annotations

from collections.abc import Iterator

from job.data.splitting import split_texts


def test_the_split_depends_on_the_words_alone() -> None:
    sentences = [f"Sentence number {number} of many." for number in range(400)]
    few = split_texts(sentences[:200], None, 0.3)
    many = split_texts([text.upper() + " " for text in reversed(sentences)] + sentences, None, 0.3)
    assert many.duplicates == 400
    assert {text.upper() for text in few.of_split["validation"]} <= {
        text.strip() for text in many.of_split["validation"]
    }


def test_any_prefix_of_a_split_is_a_random_sample() -> None:
    """Texts sorted at their source come out mixed."""
    texts = [f"first half, text {number}" for number in range(500)] + [
        f"second half, {number}" for number in range(500)
    ]
    splits = split_texts(texts, None, 0.1)
    of_first_half = sum(text.startswith("first") for text in splits.of_split["train"][:200])
    assert 70 < of_first_half < 130


def test_no_more_texts_are_read_than_wanted() -> None:
    def texts() -> Iterator[str]:
        yield from ("one", "ONE ", "two")
        raise AssertionError("read on")

    splits = split_texts(texts(), 2, 0.5)
    assert sorted(splits.of_split["train"] + splits.of_split["validation"]) == ["one", "two"]
    assert splits.duplicates == 1


def test_a_larger_share_with_latents_contains_the_smaller_one() -> None:
    texts = [f"text {number}" for number in range(1000)]
    few, many = (split_texts(texts, None, 0.1, fraction) for fraction in (0.1, 0.4))
    assert few.of_split["validation"] == many.of_split["validation"]
    assert set(few.of_split["train"]) < set(many.of_split["train"])
    for splits, fraction in ((few, 0.1), (many, 0.4)):
        assert abs(len(splits.of_split["train"]) / 900 - fraction) < 0.05
        # The tokenizer and the encoder are fitted on the same texts, whichever of them have latents.
        assert splits.to_fit_on() == split_texts(texts, None, 0.1).of_split


def test_unpaired_texts_that_are_held_out_are_not_trained_on() -> None:
    texts = [f"text {number}" for number in range(100)]
    more = [f"Text {number}" for number in range(50, 150)]
    splits = split_texts(texts, None, 0.3, 1.0, [*more, "text 120"])
    assert sorted(splits.unpaired) == sorted(f"Text {number}" for number in range(100, 150))
    assert splits.duplicates == 51

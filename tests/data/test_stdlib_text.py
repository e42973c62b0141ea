"""The embedded corpus."""

from __future__ import annotations

import sys

import pytest

from job.data.stdlib_text import is_english, sentences, stdlib_sentences

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

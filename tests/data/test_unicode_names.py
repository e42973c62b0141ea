"""The corpus of character names."""

from __future__ import annotations

import unicodedata

from job.data.sources import read_texts
from job.data.unicode_names import named_character


def test_names_are_different_and_not_numbered() -> None:
    names = list(read_texts(["unicode"], text_key="text", hf_split="train", split_sentences=True))
    assert len(names) > 20_000
    assert len(set(names)) == len(names)
    assert "latin capital letter g with hook" in names
    assert not [name for name in names if any(letter.isdigit() for letter in name) or name != name.lower()]


def test_a_name_finds_its_character() -> None:
    assert named_character("latin capital letter g with hook") == "\u0193"
    assert named_character("latin capital letter g with g") is None
    assert named_character("no-break space") is None  # nothing to look at
    assert unicodedata.name(named_character("meroitic cursive letter ya") or "") == "MEROITIC CURSIVE LETTER YA"

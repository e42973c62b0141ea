"""An embedded corpus that a small model learns in minutes: the names of Unicode's characters.

They are short (about five tokens), of few words, and regular enough that a stranger can tell a good decoding from a bad
one: `latin capital letter g with hook`. They come from the running Python's `unicodedata`, so there is nothing to
download.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator

# Blocks that are numbered rather than named: their names end in a code point or in a syllable spelled out.
NUMBERED = ("CJK ", "HANGUL SYLLABLE ")


def character_names() -> Iterator[str]:
    """Lower-case names of characters in the order of their code points; numbered ones are left out.

    A name with a digit is taken for numbered: `EGYPTIAN HIEROGLYPH A001`, `TANGUT IDEOGRAPH-17000`.
    """
    for code_point in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code_point), "")
        if name and not name.startswith(NUMBERED) and not any(letter.isdigit() for letter in name):
            yield name.lower()


def named_character(name: str) -> str | None:
    """The character of a name as `character_names` gives it; None for a text that names none, or none to look at."""
    try:
        character = unicodedata.lookup(name)
    except KeyError:
        return None
    return character if len(character) == 1 and character.isprintable() and not character.isspace() else None

"""What the sections of a page are made of, besides plots: texts, tables, and what opens when it is clicked on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from job.pages.plots import Plot

# Plain text is escaped where it is shown; Markup is shown as it stands.
Cell = str | Markup


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: Cell
    kind: str = ""  # a class of page.css: note, command
    block: str = field(default="text", init=False)


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    rows: Mapping[str, Cell]
    block: str = field(default="facts", init=False)


@dataclass(frozen=True)
class Table:
    """A table; on a narrow screen it scrolls sideways by itself."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: Sequence[int] = ()  # columns that are aligned to the right
    block: str = field(default="table", init=False)


@dataclass(frozen=True)
class Folded:
    """A table or a text behind a line that is clicked on; prints open."""

    title: str
    content: Table | Text
    is_open: bool = False
    block: str = field(default="folded", init=False)


Block = Text | Facts | Table | Folded | Plot


def marked_differences(text: str, truth: str) -> Markup:
    """A text, escaped, with the words marked that are not those of `truth` at their place."""
    words, true_words = text.split(), truth.split()
    parts = []
    for change, start, end, _, _ in difflib.SequenceMatcher(None, words, true_words, autojunk=False).get_opcodes():
        piece = " ".join(words[start:end])
        if piece:
            parts.append(Markup("{}" if change == "equal" else "<mark>{}</mark>").format(piece))
    return Markup(" ").join(parts)

"""The embedded corpus: sentences from the documentation of the running Python's own standard library.

It is there wherever Python is, so a demo needs no download. Its documentation strings and comments are full of code,
tables and markup, and a model of a few minutes learns what is frequent: most of this file tells prose from the rest.
The files are parsed, never imported: importing them would run them (`antigravity` opens a browser).
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
REFERENCE = "topics.py"  # of pydoc_data: what help("while") prints
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

MARKUP = (  # patterns and what they are replaced by, in this order
    (re.compile(r":[a-z:]+:`~?!?([^`<]*)(?:<[^`]*>)?`"), r"\1"),  # :class:`~x.Y`
    (re.compile(r"``?([^`']+?)(?:``?|''?)"), r"\1"),  # ``x``, `x', ``x''
    (re.compile(r"(?<![\w*])\*{1,2}(\w[\w ]*)\*{1,2}(?![\w*])"), r"\1"),  # *x*, **x**
    (re.compile(r"<?https?://\S+"), ""),
    (re.compile(r"\s+"), " "),
)
COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)
COMMENT_MARK = re.compile(r"^[ \t]*#+ ?", re.MULTILINE)
BULLET = re.compile(r"\s*(?:[-*+o•]|\(?\d{1,2}[.)]|\(?[a-z]\))\s+")
# The name that an explanation begins with: `:param x:`, `@return:`, `name -- ...`, `a, *b: ...`
FIELD = re.compile(
    r"\s*(?:"
    r"[:@](?:param|type|returns?|rtype|raises?|arg)\b[^:]*:"
    r"|\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*\s*(?:--|:|-)(?=\s)"
    r")\s*"
)
# Prompts and directives, calls that are a whole line, statements, rulers and underlines.
CODE_LINE = re.compile(
    r"\s*(?:>>>|\.\.\.|\.\. |[$%#>|+=~_]"
    r"|[\w.]+\(.*\)\s*(?:->.*)?$"
    r"|(?:import|from|def|class|return) .*[^.\w]$)"
    r"|.*[-=*~_^#]{4}"
)
# Within a sentence: braces, assignments and comparisons, calls, notes to programmers.
CODE = re.compile(r"[{}\\|<>]|\s=\s|==|\S\(\)\.|\b(?:XXX|TODO|FIXME)\b")
# After a full stop, unless it is that of an abbreviation, and before something that can begin a sentence.
SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<!\bcf\.)(?<!\bvs\.)(?<!\bNo\.)[\"')]*\s+(?=[\"'(]?[A-Za-z])"
)
WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
# A sentence without any of them is a title, a list of names, or another language.
FUNCTION_WORDS = re.compile(
    r"\b(?:an?|and|are|as|at|be|been|by|can|for|from|has|if|in|into|is|its?|may|not|of|on|or|otherwise|returns?|should"
    r"|so|than|that|the|then|this|to|used?|was|when|where|which|will|with)\b",
    re.IGNORECASE,
)


def docstrings(source: bytes) -> Iterator[str]:
    """Docstrings of a module and of every class and function in it, however deep."""
    with warnings.catch_warnings(action="ignore"):  # invalid escapes in old files
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # lib2to3 and others carry files that are wrong on purpose
            return
    statements: list[ast.AST] = [tree]
    while statements:
        node = statements.pop()
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
        # Expressions are most of a tree and hold no documentation, so they are not walked.
        children = ast.iter_child_nodes(node)
        statements += [child for child in children if isinstance(child, (ast.stmt, ast.excepthandler))]


def comments(source: bytes) -> Iterator[str]:
    """Comments that have lines of their own, neighbouring lines together, without the number signs."""
    for block in COMMENT_BLOCK.findall(source.decode("utf-8", "replace")):
        yield COMMENT_MARK.sub("", block)


def documentation(path: Path) -> Iterator[str]:
    """All that a file of the library says in words."""
    source = path.read_bytes()
    if path.name == REFERENCE:  # a dictionary of long texts
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    else:
        yield from docstrings(source)
        yield from comments(source)


def paragraphs(text: str) -> Iterator[str]:
    """Running text of a documentation string, its lines joined.

    Samples of code and tables are dropped; a bullet or the name of an argument begins a paragraph and is dropped too.
    """
    lines: list[str] = []
    quoted = False  # inside a literal block, which `::` opens and a line without indentation closes
    for line in [*cleandoc(text).splitlines(), ""]:
        if quoted and line.strip() and not line.startswith(" "):
            quoted = False
        if quoted or not line.strip() or CODE_LINE.match(line):
            yield " ".join(lines)
            lines = []
            continue
        bullet = BULLET.match(line)
        rest = line[bullet.end() :] if bullet else line
        name = FIELD.match(rest)
        explanation = rest[name.end() :] if name else rest
        # `word: ` in the middle of a paragraph is a name only if a sentence begins behind it.
        if bullet or (name and (not lines or explanation[:1].isupper())):
            yield " ".join(lines)
            lines = []
            rest = explanation
        lines.append(rest.strip())
        quoted = line.rstrip().endswith("::")
    yield " ".join(lines)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, markup removed, white space collapsed."""
    for paragraph in paragraphs(text):
        for pattern, replacement in MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        for sentence in SENTENCE_END.split(paragraph.strip()):
            # One-line docstrings often have no full stop.
            yield sentence + "." if sentence[-1:].isalpha() else sentence


def is_english(sentence: str) -> bool:
    """Whether a string is one whole sentence of plain English: a sensible length, mostly letters, common words."""
    words = WORD.findall(sentence)
    letters = sum(character.isalpha() or character == " " for character in sentence)
    common = FUNCTION_WORDS.search(sentence) or sum(word.islower() for word in words) >= 3
    return (
        3 <= len(words) <= 40
        and 15 <= len(sentence) <= 250
        and sentence[0].isupper()
        and sentence[-1] in ".!?"
        and sentence.isascii()
        and letters >= 0.8 * len(sentence)
        and common
        and not CODE.search(sentence)
    )


def stdlib_sentences() -> Iterator[str]:
    """English sentences of the standard library, file by file in a fixed order; nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.intersection(path.relative_to(root).parts):
            continue
        for text in documentation(path):
            yield from filter(is_english, sentences(text))

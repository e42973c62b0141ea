"""Sphinx's configuration, and what the pages need besides: `make docs`."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).resolve().parent
# The code of this checkout, whatever is installed; rules.py, which has the alerts, is a tool outside the package.
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "docker" / "monitoring")]

import reference  # noqa: E402

project = "cyclevae"
release = version = metadata.version("cyclevae")
html_title = f"{project} {release}"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

# Every reference must lead somewhere. Types in signatures are left out: most are of other packages, whose pages are on
# other hosts.
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*"), ("py:data", ".*")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
default_role = "code"  # of docstrings: `name` is code, as in Markdown

# Read offline, a page asks no other host for anything: furo takes the system's fonts, and formulas are MathML, which
# browsers draw by themselves (Sphinx's MathJax is loaded from a host on the network).
html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # it fetches the pages that were found, which browsers refuse for files read offline
html_show_copyright = False
pygments_style = "tango"
pygments_dark_style = "monokai"


class FromCode(SphinxDirective):
    """A part of a page that is made of the code, by name of reference.PAGES."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes of the part."""
        return self.parse_text_to_nodes(reference.PAGES[self.arguments[0]](), allow_section_headings=True)


def visit_math(translator: Any, node: nodes.math) -> None:
    """A formula within a line."""
    translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    """A formula on lines of its own; it scrolls where a phone is too narrow for it."""
    formula = latex2mathml.tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="math" style="overflow-x: auto">{formula}</div>')
    raise nodes.SkipNode


def list_parameters(app: Sphinx, what: str, name: str, described: Any, options: Any, lines: list[str]) -> None:
    """Docstrings say `device: what it is`, a parameter a line; Sphinx would run these lines together."""
    if what not in ("function", "method"):
        return
    parameters = inspect.signature(described).parameters
    for number, line in enumerate(lines):
        found = re.match(r"(\w+): ", line)
        if found and found.group(1) in parameters:
            lines[number] = f":param {line}"


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_directive("from-code", FromCode)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("autodoc-process-docstring", list_parameters)
    return {"parallel_read_safe": True}

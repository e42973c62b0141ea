"""One HTML file that holds all it needs: sections of texts, tables and plots, read in any browser without a network.

    page = Page("demo", "a run", [Section("Losses", [curves("L2T", {"training": (steps, losses)}, unit="nats")])])
    size = write_page(Path("report.html"), page)

A page goes with the reader's light or dark mode, fits a phone, and prints. Every text is escaped, and its policy
(Content-Security-Policy) forbids the page to load anything: it is given to others, and opened years later.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from job.errors import UserError
from job.files import write_text
from job.pages.blocks import Block
from job.pages.plots import Plot, as_json

FILES = "job.pages"  # the package with page.html, page.css and page.js


@dataclass(frozen=True)
class Section:
    """A part of a page, with an entry in its list of contents."""

    title: str
    blocks: Sequence[Block]  # shown one below the other, plots that follow each other side by side

    @property
    def anchor(self) -> str:
        """Where the list of contents leads."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())

    def rows(self) -> list[list[Block]]:
        """The blocks, with neighbouring plots together."""
        rows: list[list[Block]] = []
        for block in self.blocks:
            if rows and isinstance(block, Plot) and isinstance(rows[-1][-1], Plot):
                rows[-1].append(block)
            else:
                rows.append([block])
        return rows


@dataclass(frozen=True)
class Page:
    """What a page shows."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: Sequence[str] = field(default_factory=list)  # lines


def write_page(path: Path, page: Page) -> int:
    """Write a page, whole or not at all; returns its size in bytes."""
    text = render(page)
    write_text(path, text)
    return len(text.encode())


def render(page: Page) -> str:
    """The HTML of a page."""
    environment = Environment(
        loader=PackageLoader(FILES, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = [block for section in page.sections for block in section.blocks if isinstance(block, Plot)]
    numbers = {id(plot): number for number, plot in enumerate(plots)}
    return environment.get_template("page.html").render(
        page=page,
        plots=as_json(plots) if plots else "",
        number_of=lambda plot: numbers[id(plot)],
        library=compressed_plotly() if plots else "",
        style=file_text("page.css"),
        script=file_text("page.js"),
    )


@cache
def compressed_plotly() -> str:
    """Plotly's JavaScript, compressed and in base64: 2 MB in place of 5, in each of hundreds of pages of a sweep."""
    try:
        from plotly.offline import get_plotlyjs  # only here: it takes a moment to load
    except ImportError as error:
        raise UserError("a page with plots needs Plotly; run `pip install plotly`") from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def file_text(name: str) -> str:
    """A file that stands beside this module."""
    return resources.files(FILES).joinpath(name).read_text()

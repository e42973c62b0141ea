"""A page holds what it was given, safely, and nothing from elsewhere."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from pathlib import Path

import pytest
from browser import opened

from job.pages.blocks import Facts, Folded, Table, Text, marked_differences
from job.pages.page import Page, Section, render, write_page
from job.pages.plots import MOST_POINTS, as_json, bars, curves, thinned

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
BOTH = curves(f"losses {EVIL}", {f"a {EVIL}": ([1, 2, 3], [3.0, math.nan, 1.0]), "b": ([1], [2.0])}, unit="nats")
PAGE = Page(
    f"title {EVIL}",
    f"subtitle {EVIL}",
    [
        Section("Numbers & more", [Text(EVIL), Facts({f"name {EVIL}": EVIL}), BOTH, bars("time", {"x": 1.0})]),
        Section("Tables", [Table((EVIL, "n"), [(EVIL, "1")], numbers=(1,)), Folded(EVIL, Text(EVIL, "command"))]),
    ],
    footer=[EVIL],
)


def test_every_text_is_escaped() -> None:
    text = render(PAGE)
    assert "alert('x')</script>" not in text
    assert "<img" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") == 12
    assert len(re.findall(r"<script", text)) == 3  # Plotly, the plots, page.js


def test_nothing_is_loaded_and_plotly_is_inside() -> None:
    text = render(PAGE)
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", text)
    packed = re.search(r'id="library">([^<]+)<', text)
    assert packed is not None
    assert gzip.decompress(base64.b64decode(packed.group(1))).startswith(b"/**\n* plotly.js v")
    assert render(PAGE) == text


def test_a_page_without_plots_is_small(tmp_path: Path) -> None:
    size = write_page(tmp_path / "page.html", Page("t", "s", [Section("One", [Text("words")])]))
    assert size == (tmp_path / "page.html").stat().st_size < 20_000


def test_neighbouring_plots_stand_side_by_side() -> None:
    rows = PAGE.sections[0].rows()
    assert [len(row) for row in rows] == [1, 1, 2]
    assert PAGE.sections[0].anchor == "numbers---more"


def test_plots_are_json_in_which_gaps_are_null() -> None:
    text = as_json([BOTH])
    assert "<" not in text
    (plot,) = json.loads(text)
    assert plot["traces"][0]["y"] == [3.0, None, 1.0]
    assert plot["traces"][0]["name"] == f"a {EVIL}"
    assert plot["layout"]["yaxis"]["title"]["text"] == "nats"


@pytest.mark.parametrize("count", [0, 1, MOST_POINTS, MOST_POINTS + 1, 7 * MOST_POINTS + 3])
def test_long_curves_are_thinned_and_keep_their_ends(count: int) -> None:
    values = [float(number) for number in range(count)]
    kept = thinned(values)
    assert len(kept) <= MOST_POINTS + 1
    assert kept[:1] == values[:1]
    assert kept[-1:] == values[-1:]
    assert count > MOST_POINTS or kept == values


def test_words_that_differ_are_marked() -> None:
    assert marked_differences("a <b> x d", "a <b> c d") == "a &lt;b&gt; <mark>x</mark> d"
    assert marked_differences("same words", "same words") == "same words"
    assert marked_differences("", "something") == ""


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme", "touch"), [(1280, "light", False), (390, "dark", True)])
def test_a_browser_draws_it_without_complaint_or_request(width: int, scheme: str, touch: bool, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", PAGE)
    with opened(tmp_path / "page.html", width, scheme, touch) as there:
        assert there.evaluate("document.querySelectorAll('.plot .main-svg').length") > 0
        assert there.evaluate("document.documentElement.scrollWidth") <= width
        assert there.evaluate("document.querySelectorAll('.trace').length") >= 3
        buttons = there.evaluate("[...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)")
        assert set(buttons) == {"Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes", "Download plot as a PNG"}
        dark, light = "rgb(20, 24, 29)", "rgb(255, 255, 255)"
        background = "getComputedStyle(document.body).backgroundColor"
        ink = "document.querySelector('.plot').layout.font.color"
        assert there.evaluate(background) == (dark if scheme == "dark" else light)
        there.page.emulate_media(media="print")
        there.page.wait_for_timeout(1000)  # waiting for a condition would need eval, which the page forbids
        assert there.evaluate(ink) == "#1c2126"
        assert there.evaluate(background) == light
        assert (there.console, there.requests) == ([], [])


@pytest.mark.browser
def test_the_page_may_load_nothing(tmp_path: Path) -> None:
    """The policy, not good will: what a script wants from elsewhere is refused."""
    write_page(tmp_path / "page.html", PAGE)
    with opened(tmp_path / "page.html") as there:
        there.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
        there.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
        there.page.wait_for_timeout(200)
        assert len(there.console) >= 2
        assert all("Content Security Policy" in line for line in there.console)

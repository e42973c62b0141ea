"""A page in headless Chromium, for tests: what it printed to the console, and what it wanted from elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60  # that a busy machine may take to draw


@dataclass
class Opened:
    """A page that is open and drawn."""

    page: Any  # of Playwright
    console: list[str] = field(default_factory=list)  # all that was printed, and errors that nobody caught
    requests: list[str] = field(default_factory=list)  # of anything but the page itself

    def evaluate(self, script: str) -> Any:
        """What a JavaScript expression gives."""
        return self.page.evaluate(script)


@contextmanager
def opened(path: Path, width: int = 1280, scheme: str = "light", touch: bool = False) -> Iterator[Opened]:
    """A file, opened at a width in pixels and with the reader's colour scheme. Skips the test without a browser."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Chromium and Playwright: make browser-tools")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: make browser-tools")
    with api.sync_playwright() as playwright:
        # Without its sandbox, which a container's root cannot have.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        viewport = {"width": width, "height": 900}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, has_touch=touch, is_mobile=touch)
        found = Opened(context.new_page())
        found.page.on("console", lambda message: found.console.append(message.text))
        found.page.on("pageerror", lambda error: found.console.append(str(error)))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.goto(path.resolve().as_uri())
        found.page.wait_for_selector("html[data-drawn]", timeout=1000 * SECONDS)
        found.requests.remove(path.resolve().as_uri())
        yield found
        browser.close()

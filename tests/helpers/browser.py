"""A person's browser before the service: ``visitor(browser, url)`` opens pages, and hears what their consoles complain of."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
SAID_IN_WORDS = re.compile("the server responded with a status of")  # which the page says itself
PATIENCE_MS = 120_000  # for what has to come at once, on however busy a machine
NewPage = Callable[..., Page]


@contextlib.contextmanager
def run_browser() -> Iterator[Browser]:
    """Chromium, until the block ends. What a test expects of a page may take PATIENCE_MS from then on."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE_MS)
        yield browser
        browser.close()


@contextlib.contextmanager
def visitor(browser: Browser, url: str, *, forgiven: re.Pattern[str] = SAID_IN_WORDS) -> Iterator[NewPage]:
    """Gives ``open_page(path)``, each page with storage of its own; ``has_clock`` gives it a clock that the test can put on.

    When the block ends nothing may have been complained of on a console, a violated policy for one, but what is ``forgiven``.
    """
    complaints: list[str] = []
    with contextlib.ExitStack() as opened:

        def hear(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and not forgiven.search(message.text):
                complaints.append(message.text)

        def open_page(path: str = "/", *, has_clock: bool = False, **options: Any) -> Page:
            context = browser.new_context(base_url=url, **(DESKTOP | options))
            opened.callback(context.close)
            context.set_default_timeout(PATIENCE_MS)
            page = context.new_page()
            if has_clock:
                page.clock.install()
            page.on("console", hear)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(path)
            return page

        yield open_page
    assert complaints == []

"""Run Chromium: ``open_pages(browser, url)`` opens pages and checks their consoles for errors."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
SIZES = {
    "phone": {"width": 360, "height": 740},
    "tablet": {"width": 820, "height": 1180},
    "desktop": {"width": 1440, "height": 900},
}
CONTROLS = "main a, main button, main input, main select, main summary, main label.button"
FAILED_REQUEST = re.compile("the server responded with a status of")  # the page shows the error, too
TIMEOUT_MS = 120_000  # the machine may be busy
ACCESSIBILITY = {"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]}
NewPage = Callable[..., Page]


@contextlib.contextmanager
def run_browser() -> Iterator[Browser]:
    """Run Chromium until the block ends, with TIMEOUT_MS for expectations."""
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=TIMEOUT_MS)
        yield browser
        browser.close()


@contextlib.contextmanager
def open_pages(browser: Browser, url: str, *, ignored: re.Pattern[str] = FAILED_REQUEST) -> Iterator[NewPage]:
    """Yield ``open_page(path)``, which opens a page in a new context; with ``has_clock`` the test controls its clock.

    Fails at the end of the block if a console had an error or a warning, such as a policy violation, other than ``ignored``.
    """
    messages: list[str] = []
    with contextlib.ExitStack() as opened:

        def record(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and not ignored.search(message.text):
                messages.append(message.text)

        def open_page(path: str = "/", *, has_clock: bool = False, **options: Any) -> Page:
            context = browser.new_context(base_url=url, **(DESKTOP | options))
            opened.callback(context.close)
            context.set_default_timeout(TIMEOUT_MS)
            page = context.new_page()
            if has_clock:
                page.clock.install()
            page.on("console", record)
            page.on("pageerror", lambda error: messages.append(str(error)))
            page.goto(path)
            return page

        yield open_page
    assert messages == []


def drop(page: Page, *paths: Path) -> None:
    """Drop files and folders onto the first drop zone of a page, as from a file manager."""
    box = page.locator("[data-drop]").first.bounding_box()
    assert box
    point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + 10}
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for event in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": event, **point, "data": data})
    session.detach()


def check_accessibility(page: Page, name: str) -> None:
    """Check that a page is accessible and not wider than its window.

    With ``SCREENSHOTS=folder`` in the environment, its screenshot is saved as ``name``.png.
    """
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder, f"{name}.png"), full_page=True)
    found = Axe().run(page, options=ACCESSIBILITY)
    assert found.violations_count == 0, f"{name}: {found.generate_report()}"
    assert page.viewport_size
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"], name


def positions(page: Page, selector: str = CONTROLS) -> dict[str, list[int]]:
    """Return the left and the top edge of visible controls in the window, by their kind and name."""
    return page.locator(selector).evaluate_all(
        """(elements) => {
            const found = {};
            for (const element of elements) {
                if (!element.checkVisibility({ visibilityProperty: true })) continue;
                const text = element.id || element.value || element.textContent.trim().replace(/\\s+/g, " ");
                const name = `${element.localName} ${text}`;
                let key = name;
                for (let i = 2; key in found; i += 1) key = `${name} ${i}`;
                const box = element.getBoundingClientRect();
                found[key] = [box.left, box.top].map(Math.round);
            }
            return found;
        }"""
    )

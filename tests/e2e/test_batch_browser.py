"""Reviewing many photos in a browser: with the mouse, by keyboard, with a box, from the map, and without anything moving.

Where no Chromium is installed these tests are skipped. ``SCREENSHOTS=folder`` saves screenshots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.helpers.browser import PHONE, NewPage, check_accessibility, open_pages
from tests.helpers.server import Server, serve_gallery

pytestmark = pytest.mark.slow

VIEW = {"source": "evaluation", "sort": "name"}
Row = dict[str, Any]
POSITIONS = """() => [...document.querySelectorAll(".tile, .batch-bar a, .batch-bar button")].map((element) => {
  const box = element.getBoundingClientRect();
  return [box.left, box.top, box.width, box.height].map(Math.round);
})"""


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_gallery(tiny_bundle, tmp_path_factory.mktemp("batch")) as server:
        yield server


@pytest.fixture
def new_page(browser: Browser, server: Server) -> Iterator[NewPage]:
    with open_pages(browser, server.url) as open_page:
        yield open_page


def rows(server: Server, **query: str) -> list[Row]:
    return list(server.get(f"/gallery/photos.json?{urlencode(query)}").json()["rows"])


def labels(server: Server) -> list[str | None]:
    """Return the reviewed label of each photo of the view."""
    return [row["decision"] and row["decision"]["new_label"] for row in rows(server, **VIEW)]


def selected(page: Page) -> list[int]:
    """Return the positions of the selected photos."""
    boxes = page.locator(".tile-select input")
    return [index for index in range(boxes.count()) if boxes.nth(index).is_checked()]


def test_photos_are_selected_by_mouse_keys_and_a_box(new_page: NewPage, server: Server) -> None:
    page = new_page(f"/gallery/photos?{urlencode(VIEW)}")
    boxes, status = page.locator(".tile-select input"), page.locator("#batch-status")
    expect(page.get_by_role("button", name="green")).to_be_disabled()
    boxes.nth(1).click()
    boxes.nth(4).click(modifiers=["Shift"])
    expect(status).to_have_text("4 photos selected.")
    assert selected(page) == [1, 2, 3, 4]
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("x")
    assert selected(page) == [1, 2, 3, 4, 5, 6]
    page.keyboard.press("Enter")  # submits nothing
    page.keyboard.press("Space")
    assert selected(page) == [1, 2, 3, 4, 5]
    page.keyboard.press("Escape")
    expect(status).to_have_text("Nothing selected.")
    first, second = (page.locator(".tile").nth(index).bounding_box() for index in (0, 1))
    assert first
    assert second
    page.mouse.move(first["x"] + first["width"] / 2, first["y"] + 60)
    page.mouse.down()
    page.mouse.move(second["x"] + second["width"] / 2, second["y"] + 90, steps=5)
    page.mouse.up()
    expect(status).to_have_text("2 photos selected.")  # and no photo was opened
    assert selected(page) == [0, 1]
    page.get_by_role("link", name="None", exact=True).click()
    page.get_by_role("link", name="Select page").click()
    expect(status).to_have_text("18 photos selected.")
    page.get_by_role("link", name="All 18").click()
    expect(status).to_have_text("All 18 photos selected.")
    boxes.nth(0).click()  # any change ends the selection of all pages
    expect(status).to_have_text("17 photos selected.")
    assert labels(server) == [None] * 18


@pytest.mark.parametrize("has_script", [True, False], ids=["script", "no-script"])
@pytest.mark.parametrize("device", ["phone", "desktop"])
def test_repeated_clicks_at_one_position_review_once(new_page: NewPage, server: Server, device: str, has_script: bool) -> None:
    """Neither a save nor an undo moves a photo or a button, so that a second click changes nothing that was not selected."""
    options = PHONE if device == "phone" else {}
    page = new_page(f"/gallery/photos?{urlencode(VIEW)}", java_script_enabled=has_script, **options)
    status = page.locator("#batch-status")
    before = labels(server)
    for index in (0, 1):
        page.locator(".tile-select input").nth(index).check()
    positions = page.evaluate(POSITIONS)

    def center(name: str) -> tuple[float, float]:
        box = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert box
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    green, undo = center("green"), center("Undo")
    page.mouse.click(*green)
    expect(status).to_have_text("Labeled 2 photos green.")
    assert page.evaluate(POSITIONS) == positions
    assert labels(server) == ["green", "green", *before[2:]]
    if has_script:
        page.mouse.click(*green)  # disabled, as nothing is selected now
        assert labels(server) == ["green", "green", *before[2:]]
    page.mouse.click(*undo)
    expect(status).to_have_text("Undone for 2 photos.")
    assert page.evaluate(POSITIONS) == positions
    page.mouse.click(*undo)
    assert labels(server) == before


def test_a_lasso_on_the_map_leads_to_the_grid(new_page: NewPage, server: Server) -> None:
    page = new_page("/gallery/map")
    page.set_viewport_size({"width": 1280, "height": 1100})  # the mouse only reaches what is in view
    expect(page.locator("#map")).to_have_attribute("data-ready", "1")
    expect(page.locator("#map-legend")).to_contain_text("green 6")
    expect(page.locator("#map-count")).to_have_text("18")
    box = page.locator("#map-points").bounding_box()
    assert box
    right, bottom = box["width"] - 14, box["height"] - 14  # inside the rounded corners
    corners = [(14, 14), (right, 14), (right, bottom), (14, bottom)]
    page.mouse.move(box["x"] + corners[0][0], box["y"] + corners[0][1])
    page.mouse.down()
    for x, y in corners[1:]:
        page.mouse.move(box["x"] + x, box["y"] + y, steps=3)
    page.mouse.up()
    expect(page.locator("#batch-status")).to_have_text("All 18 photos selected.")
    assert re.search(r"region=[0-9a-f]+", page.url)
    page.go_back()
    expect(page.locator("#map")).to_have_attribute("data-ready", "1")
    point = server.get("/gallery/map.json").json()
    page.locator("#map-color").select_option("outcome")
    expect(page.locator("#map-legend")).to_contain_text("Correct")
    scale = (min(box["width"], box["height"]) - 32) / point["size"]
    left, top = ((box[side] - point["size"] * scale) / 2 for side in ("width", "height"))
    page.mouse.move(box["x"] + left + point["x"][0] * scale, box["y"] + top + point["y"][0] * scale)
    expect(page.locator("#map-card")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["phone", "desktop"])
def test_the_pages_are_accessible_and_fit(new_page: NewPage, server: Server, scheme: str, device: str) -> None:
    options = PHONE if device == "phone" else {}
    sha256 = rows(server, **VIEW)[0]["sha256"]
    page = new_page("/gallery/map", color_scheme=scheme, reduced_motion="reduce", **options)
    expect(page.locator("#map")).to_have_attribute("data-ready", "1")
    check_accessibility(page, f"map-{device}-{scheme}")
    page.goto(f"/gallery/photos?similar={sha256}&select=all")
    expect(page.get_by_role("slider")).to_be_visible()
    check_accessibility(page, f"similar-{device}-{scheme}")

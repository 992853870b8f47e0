"""Reviewing in a browser: with the keyboard, by two people at once, without JavaScript, and the layout of the page.

Where no Chromium is installed these tests are skipped. ``SCREENSHOTS=folder`` saves screenshots.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, expect

from tests.helpers.browser import PHONE, NewPage, check_accessibility, open_pages
from tests.helpers.server import Server, poll, serve_gallery

pytestmark = pytest.mark.slow

LEFT = {"source": "evaluation", "review": "unreviewed", "sort": "name"}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_gallery(tiny_bundle, tmp_path_factory.mktemp("review")) as server:
        yield server


@pytest.fixture
def new_page(browser: Browser, server: Server) -> Iterator[NewPage]:
    with open_pages(browser, server.url) as open_page:
        yield open_page


def rows(server: Server, **query: str) -> list[Row]:
    found: list[Row] = server.get(f"/gallery/photos.json?{urlencode(query)}").json()["rows"]
    return found


def page_of(row: Row, **query: str) -> str:
    return f"/gallery/photo?{urlencode(query | {'photo': row['photo'], 'sha256': row['sha256']})}"


def past(server: Server, row: Row) -> list[str]:
    entries = server.get(f"/gallery/history.json?sha256={row['sha256']}").json()["history"]
    return [f"{entry['decision']} {entry['new_label'] or ''}".strip() for entry in entries]


def remove_reviews(server: Server, row: Row) -> None:
    """Undo all reviews of a photo."""
    fields = {"photo": row["photo"], "sha256": row["sha256"], "decision": "undo"}
    headers = {"Content-Type": "application/json"}
    for _ in range(20):
        version = re.search(r'name="expected_version" value="(\d*)"', server.get(page_of(row)).body.decode())
        assert version
        body = json.dumps(fields | {"expected_version": version[1]}).encode()
        reply = server.request("POST", "/gallery/review", body, headers=headers)
        if reply.code == "nothing_to_undo":
            return
        assert reply.status == 200, reply.body
    raise AssertionError("there is always another review to undo")


def name_of(row: Row) -> str:
    return Path(row["photo"]).name


def has_looked(server: Server, row: Row) -> None:
    """Wait for the heat map, which is computed with a low priority. A page does not wait for it long."""
    query = urlencode({"photo": row["photo"], "class": row["predicted"]})
    poll(lambda: server.get(f"/gallery/images/{row['sha256']}/heatmap.png?{query}").status == 200)


def test_photos_are_reviewed_with_the_keyboard_only(new_page: NewPage, server: Server) -> None:
    first, second, third = rows(server, **LEFT)[:3]
    page = new_page(page_of(first, **LEFT))
    heading, message = page.get_by_role("heading", level=1), page.get_by_role("status")
    expect(heading).to_have_text(name_of(first))
    page.keyboard.press("t")
    page.keyboard.type("1 and bad: keys are letters here")
    page.keyboard.press("Escape")
    page.keyboard.press("2")  # blue, green, red
    expect(heading).to_have_text(name_of(second))
    expect(message).to_contain_text(f"Saved: {name_of(first)}, relabeled to green.")
    assert past(server, first) == ["label green"]
    expect(page.get_by_label("Note")).to_have_value("")
    expect(page).not_to_have_url(re.compile("saved="))
    page.keyboard.press("u")  # nothing is decided here: the one just saved is meant
    expect(heading).to_have_text(name_of(first))
    expect(message).to_contain_text(f"Undone: {name_of(first)}, ")
    expect(message).to_contain_text("review removed; label is")
    expect(page.locator("#history")).to_contain_text("undid: ")
    expect(page.get_by_label("Note")).to_have_value("1 and bad: keys are letters here")
    page.get_by_label("Note").fill("")
    assert past(server, first) == ["undo", "label green"]
    page.get_by_label("Save and go to the next photo").uncheck()
    page.keyboard.press("n")
    expect(page.locator("#state")).to_contain_text("Anonymous marked as none of the classes.")
    expect(heading).to_have_text(name_of(first))
    expect(page.get_by_label("Save and go to the next photo")).not_to_be_checked()
    page.keyboard.press("u")
    expect(page.locator("#state")).to_contain_text("Not reviewed yet.")
    page.get_by_label("Save and go to the next photo").check()
    for key in ("ArrowRight", "j"):
        page.keyboard.press(key)
        expect(heading).to_have_text(name_of(second if key == "ArrowRight" else third))
        page.wait_for_load_state()  # the next page handles keys only once it is loaded
    page.keyboard.press("k")
    expect(heading).to_have_text(name_of(second))
    page.wait_for_load_state()
    page.keyboard.press("b")
    expect(heading).to_have_text(name_of(third))
    page.go_back()
    expect(heading).to_have_text(name_of(second))
    assert past(server, second) == ["bad"]


def test_the_list_of_shortcuts_disables_them_while_open(new_page: NewPage, server: Server) -> None:
    row = rows(server, **LEFT)[0]
    page = new_page(page_of(row))
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Shortcuts")
    expect(dialog).to_be_visible()
    for words in ("blue", "Undo the last save", "Previous photo"):
        expect(dialog).to_contain_text(words)
    page.keyboard.press("b")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Shortcuts").click()
    expect(dialog).to_be_visible()
    dialog.get_by_role("button", name="Close").press("Enter")
    expect(dialog).to_be_hidden()
    assert past(server, row)[:1] != ["bad"]


def test_two_reviewers_see_each_others_decisions_and_conflicts_are_shown(new_page: NewPage, server: Server) -> None:
    row = rows(server, **LEFT)[0]
    ann, ben = new_page(page_of(row)), new_page(page_of(row), has_clock=True)
    for page, name in ((ann, "Ann"), (ben, "Ben")):
        page.get_by_label("Your name").fill(name)
        page.get_by_label("Save and go to the next photo").uncheck()
    ben.get_by_label("Note").fill("It is a toy.")
    ann.get_by_role("button", name="Exclude photo").click()
    expect(ann.locator("#state")).to_contain_text("Ann excluded the photo.")
    ben.clock.fast_forward(11_000)
    expect(ben.locator("#state")).to_contain_text("Ann excluded the photo.")
    expect(ben.get_by_role("status")).to_contain_text("Ann excluded the photo")
    expect(ben.get_by_label("Note")).to_have_value("It is a toy.")
    ben.route("**/gallery/history.json?*", lambda route: route.fulfill(status=503))  # no updates arrive from now on
    ann.keyboard.press("1")
    expect(ann.locator("#state")).to_contain_text("blue.")
    ben.get_by_role("button", name="None of these classes").click()
    expect(ben.get_by_role("alert")).to_contain_text("Ann has just")
    expect(ben.get_by_label("Note")).to_have_value("It is a toy.")
    expect(ben.get_by_role("button", name='Overwrite with "none of the classes"')).to_be_focused()
    ben.keyboard.press("Enter")
    expect(ben.locator("#state")).to_contain_text("Ben marked as none of the classes.")
    expect(ben.locator("#history")).to_contain_text("It is a toy.")
    assert past(server, row)[:3] == ["neither", "label blue", "bad"]


def test_an_unreachable_server_loses_no_typed_text(new_page: NewPage, server: Server) -> None:
    row = rows(server, **LEFT)[0]
    page = new_page(page_of(row))
    page.get_by_label("Note").fill("Long thoughts.")
    page.route("**/gallery/review", lambda route: route.fulfill(status=502, body="Bad gateway", content_type="text/plain"))
    page.get_by_role("button", name="Exclude photo").click()
    expect(page.get_by_role("alert")).to_contain_text("Not saved: the server sent no valid response.")
    expect(page.get_by_label("Note")).to_have_value("Long thoughts.")
    page.reload()
    expect(page.get_by_label("Note")).to_have_value("Long thoughts.")


def test_the_heatmap_replaces_the_photo_and_the_next_photo_is_prefetched(new_page: NewPage, server: Server) -> None:
    first, second = rows(server, **LEFT)[:2]
    has_looked(server, first)
    page = new_page("/model")
    with page.expect_request(lambda request: f"{second['sha256']}/original.jpg" in request.url):
        page.goto(page_of(first, **LEFT))
    page.get_by_label("Note").fill("Still typing")
    page.locator("a[data-explain]").first.click()
    picture = page.get_by_role("img", name=re.compile("regions that support"))
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 32
    expect(page.get_by_label("Note")).to_have_value("Still typing")
    expect(page.get_by_role("status")).to_contain_text(re.compile("No region supports|Brighter areas"))


def test_without_javascript_every_action_works_as_a_form(new_page: NewPage, server: Server) -> None:
    first, second = rows(server, **LEFT)[:2]
    has_looked(server, first)
    page = new_page(page_of(first, **LEFT), java_script_enabled=False)
    heading = page.get_by_role("heading", level=1)
    page.get_by_label("Your name").fill("Zoë Ångström")
    page.get_by_label("Your name").press("Enter")  # decides nothing
    page.get_by_label("Note").fill("By hand")
    page.get_by_role("button", name="None of these classes").click()
    expect(heading).to_have_text(name_of(second))
    expect(page.locator("#status")).to_contain_text("marked as none of the classes")
    expect(page.get_by_label("Your name")).to_have_value("Zoë Ångström")
    page.get_by_role("button", name="Undo").click()
    expect(heading).to_have_text(name_of(first))
    expect(page.locator("#history")).to_contain_text("By hand")
    page.locator("a[data-explain]").first.click()
    expect(page.get_by_role("img", name=re.compile("regions that support"))).to_be_visible()
    expect(page.get_by_role("button", name="Shortcuts")).to_be_hidden()
    assert past(server, first)[:2] == ["undo", "neither"]


SIZES = [(390, 844), (1024, 768), (1440, 900)]
POSITIONS = """() => [...document.querySelectorAll("#actions button, #new-label, .photo-steps > *")].map((element) => {
  const box = element.getBoundingClientRect();
  return [box.left, box.top, box.width, box.height].map(Math.round);
})"""


@pytest.mark.parametrize("has_script", [True, False], ids=["script", "no-script"])
@pytest.mark.parametrize("size", SIZES, ids=["phone", "tablet", "desktop"])
def test_repeated_clicks_at_one_position_do_the_same(
    new_page: NewPage, server: Server, size: tuple[int, int], has_script: bool
) -> None:
    """A save and an undo move nothing: a click at one position confirms three photos, and at another undoes the last one."""
    view = {"source": "evaluation", "sort": "name"}
    photos = rows(server, **view)[:4]
    for photo in photos:  # a save goes on to the next unreviewed photo
        remove_reviews(server, photo)
    before = [len(past(server, photo)) for photo in photos]
    viewport = {"width": size[0], "height": size[1]}
    page = new_page(page_of(photos[0], **view), viewport=viewport, java_script_enabled=has_script)
    heading, status = page.get_by_role("heading", level=1), page.locator("#status")

    def center(selector: str) -> tuple[float, float]:
        box = page.locator(selector).bounding_box()
        assert box
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    positions = page.evaluate(POSITIONS)
    keep, undo = center("#actions > .action >> nth=0"), center("#undo button")
    for photo, following in itertools.pairwise(photos):
        page.mouse.click(*keep)
        expect(heading).to_have_text(name_of(following))
        expect(status).to_contain_text(f"Saved: {name_of(photo)}")
        assert page.evaluate(POSITIONS) == positions
    page.mouse.click(*undo)
    expect(heading).to_have_text(name_of(photos[2]))
    expect(status).to_contain_text(f"Undone: {name_of(photos[2])}")
    assert page.evaluate(POSITIONS) == positions
    for _ in range(2):
        page.mouse.click(*undo)
    page.mouse.click(*keep)
    expect(heading).to_have_text(name_of(photos[3]))
    kept = [f"label {photo['label']}" for photo in photos]
    added = [past(server, photo)[: -count or None] for photo, count in zip(photos, before, strict=True)]
    assert added == [[kept[0]], [kept[1]], [kept[2], "undo", kept[2]], []]


@pytest.mark.parametrize(
    ("size", "has_script"), [(SIZES[0], True), (SIZES[0], False), (SIZES[1], True), (SIZES[2], True)],
    ids=["phone", "phone without script", "tablet", "desktop"],
)  # fmt: skip
def test_nothing_moves_on_the_landing_page_after_reviews(
    new_page: NewPage, server: Server, size: tuple[int, int], has_script: bool
) -> None:
    """Clicks at one position review one photo after the other, and the queues keep their place."""
    page = new_page("/gallery", viewport={"width": size[0], "height": size[1]}, java_script_enabled=has_script)
    places = ".figures > div, .actions .button, .queue h3, .queue .why, .strip > li:first-child"
    corners = f"""() => [...document.querySelectorAll("{places}")].map((element) => element.getBoundingClientRect()).map(
      (box) => [box.left, box.top].map(Math.round))"""
    before = page.evaluate(corners)
    following = page.get_by_text("Next unreviewed").first.bounding_box()
    assert following
    position = following["x"] + following["width"] / 2, following["y"] + following["height"] / 2
    heading, reviewed = page.get_by_role("heading", level=1), []
    for _ in range(2):
        page.mouse.click(*position)
        page.wait_for_url("**/gallery/photo?*")
        reviewed.append(heading.inner_text())
        page.get_by_role("button", name="Keep label").click()
        expect(page.locator("#status")).to_contain_text(f"Saved: {reviewed[-1]}")
        page.goto("/gallery")
        assert page.evaluate(corners) == before
    assert len(set(reviewed)) == 2
    for row in rows(server, source="evaluation"):
        if name_of(row) in reviewed:
            remove_reviews(server, row)


def test_a_double_click_is_one_review(new_page: NewPage, server: Server) -> None:
    first, second = rows(server, **LEFT)[:2]
    page = new_page(page_of(first, **LEFT))
    page.get_by_role("button", name="Keep label").dblclick()
    expect(page.get_by_role("heading", level=1)).to_have_text(name_of(second))
    assert (past(server, first), past(server, second)) == ([f"label {first['label']}"], [])


def test_a_class_is_found_by_its_first_letters(new_page: NewPage, server: Server) -> None:
    row = rows(server, **LEFT)[0]
    page = new_page(page_of(row, **LEFT))
    page.keyboard.press("/")
    page.keyboard.type("purple")
    page.keyboard.press("Enter")
    assert page.locator("#new-label").evaluate("field => field.validationMessage") == "Enter one of the classes."
    assert past(server, row) == []
    page.locator("#new-label").fill("GRE")
    page.locator("#new-label").press("Enter")
    expect(page.locator("#status")).to_contain_text(f"Saved: {name_of(row)}")
    assert past(server, row) == ["label green"]


def test_single_key_shortcuts_can_be_disabled_permanently(new_page: NewPage, server: Server) -> None:
    row, following = rows(server, **LEFT)[:2]
    page = new_page(page_of(row, **LEFT))
    page.get_by_role("button", name="Shortcuts").click()
    page.get_by_label("Single-key shortcuts").uncheck()
    page.keyboard.press("Escape")
    page.reload()
    expect(page.locator("#actions kbd").first).to_be_hidden()
    for key in ("b", "n", "1", "/", "t", "?", "j"):
        page.keyboard.press(key)
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_role("heading", level=1)).to_have_text(name_of(row))
    assert past(server, row) == []
    page.keyboard.press("ArrowRight")  # not a character
    expect(page.get_by_role("heading", level=1)).to_have_text(name_of(following))
    page.get_by_role("button", name="Shortcuts").click()
    expect(page.get_by_label("Single-key shortcuts")).not_to_be_checked()


def test_the_photo_is_enlarged_and_moved_by_keys(new_page: NewPage, server: Server) -> None:
    row, following = rows(server, **LEFT)[:2]
    page = new_page(page_of(row, **LEFT))
    viewport = page.locator("#viewport")
    viewport.focus()
    page.keyboard.press("+")
    page.keyboard.press("+")
    expect(page.locator("#zoom")).to_have_text("200%")
    left = viewport.evaluate("element => element.scrollLeft")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("left => document.getElementById('viewport').scrollLeft > left", arg=left)
    expect(page.get_by_role("heading", level=1)).to_have_text(name_of(row))
    page.keyboard.press("0")
    expect(page.locator("#zoom")).to_have_text("100%")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", level=1)).to_have_text(name_of(following))


def test_previous_leads_back_to_a_photo_that_left_the_filter(new_page: NewPage, server: Server) -> None:
    first, second, third = rows(server, **LEFT)[:3]
    page = new_page(page_of(first, **LEFT))
    heading = page.get_by_role("heading", level=1)
    for following in (second, third):
        page.get_by_role("button", name="Keep label").click()
        expect(heading).to_have_text(name_of(following))
    page.locator("#status").get_by_role("link").click()
    expect(heading).to_have_text(name_of(second))
    page.get_by_role("link", name="Previous").click()
    expect(heading).to_have_text(name_of(first))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["phone", "desktop"])
def test_the_page_is_accessible_and_fits(new_page: NewPage, server: Server, scheme: str, device: str) -> None:
    row = rows(server, source="evaluation", sort="name")[-1]
    has_looked(server, row)
    options = PHONE if device == "phone" else {}
    page = new_page(page_of(row, explain=row["predicted"]), color_scheme=scheme, reduced_motion="reduce", **options)
    for name in ("photo", "decided", "keys"):
        if name == "decided":
            page.get_by_label("Save and go to the next photo").uncheck()
            page.get_by_role("button", name="Exclude photo").click()
            expect(page.locator("#status")).to_contain_text("Saved: ")
        elif name == "keys":
            page.get_by_role("button", name="Shortcuts").click()
        check_accessibility(page, f"{name}-{device}-{scheme}")

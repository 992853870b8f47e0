"""The upload page in a browser: by mouse and keyboard, on a phone, and without JavaScript.

The tests are skipped without Chromium. ``SCREENSHOTS=folder`` saves screenshots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.helpers.browser import PHONE, SIZES, NewPage, check_accessibility, open_pages, positions
from tests.helpers.server import Server, serve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace) -> Iterator[Server]:
    with serve(tiny_bundle.path, max_images=4, max_body_mb=1) as server:
        yield server


@pytest.fixture
def new_page(browser: Browser, server: Server) -> Iterator[NewPage]:
    with open_pages(browser, server.url) as open_page:
        yield open_page


@pytest.fixture
def photos(tiny_bundle: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    bad = tmp_path / "notes.txt"
    bad.write_text("no picture")
    red, blue = (sorted((tiny_bundle.photos / name).iterdir()) for name in ("red", "blue"))
    return SimpleNamespace(red=red, blue=blue, bad=bad)


def choose(page: Page, *files: Path, by: str = "#files") -> None:
    page.set_input_files(by, list(files))


def answers(page: Page, count: int) -> list[str]:
    """Return the headings of ``count`` cards (file, class, probability) once all photos are predicted."""
    expect(page.locator("#cards > .card")).to_have_count(count)
    expect(page.locator("#cards > .waiting")).to_have_count(0)
    return [" ".join(text.split()) for text in page.locator("#cards h3").all_text_contents()]


def put(page: Page, kind: str, *files: Path) -> None:
    """Drop or paste files by the events of a browser. ``kind`` is the name of the event."""
    given = [{"name": file.name, "bytes": list(file.read_bytes())} for file in files]
    page.evaluate(
        """([kind, given]) => {
            const carried = new DataTransfer();
            for (const { name, bytes } of given) carried.items.add(new File([new Uint8Array(bytes)], name));
            const options = { bubbles: true, cancelable: true };
            const event = kind === "paste"
                ? new ClipboardEvent("paste", { ...options, clipboardData: carried })
                : new DragEvent(kind, { ...options, dataTransfer: carried });
            document.querySelector("#zone").dispatchEvent(event);
        }""",
        [kind, given],
    )


def answer_with(page: Page, *replies: dict[str, Any]) -> list[str]:
    """Mock the next responses to /predict. Returns the list of mocked requests."""
    requested: list[str] = []
    left = list(replies)

    def reply(route: Route) -> None:
        requested.append(route.request.headers.get("x-api-key", ""))
        if left:
            route.fulfill(**left.pop(0))
        else:
            route.continue_()

    page.route("**/predict?*", reply)
    return requested


def problem(status: int, detail: str, **headers: str) -> dict[str, Any]:
    body = json.dumps({"code": "overloaded", "status": status, "detail": detail})
    return {"status": status, "body": body, "headers": headers, "content_type": "application/problem+json"}


# Input and results


def test_each_photo_gets_a_card_and_an_invalid_one_its_problem(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page()
    choose(page, photos.red[0], photos.bad, photos.blue[0])
    red, bad, blue = answers(page, 3)
    assert re.fullmatch(r"red\.000\.jpg: red, [<>]?[\d.]+%", red)
    assert bad == "notes.txt:"
    assert blue.startswith("blue.000.jpg: blue,")
    expect(page.locator(".card").nth(1)).to_contain_text("is not a supported image")
    picture = page.locator(".card").first.locator("img")
    expect(picture).to_have_attribute("alt", "The part of red.000.jpg that the model saw")
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [32, 32]
    assert page.locator(".card").first.locator(".bar").count() == 3
    expect(page.get_by_role("status")).to_contain_text("red.000.jpg: red,")
    expect(page.locator("#progress")).to_be_hidden()


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_photos_can_be_dropped_and_pasted(new_page: NewPage, photos: SimpleNamespace, kind: str) -> None:
    page = new_page()
    put(page, kind, photos.red[0], photos.blue[0])
    assert len(answers(page, 2)) == 2


def test_a_drag_is_shown_and_ends(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page()
    put(page, "dragover", photos.red[0])
    expect(page.locator("#zone.over")).to_be_visible()
    put(page, "dragleave")
    expect(page.locator("#zone.over")).to_have_count(0)
    put(page, "drop")
    expect(page.get_by_role("status")).to_contain_text("No image found. Drop or paste an image file.")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text/uri-list", "This is a link, not a file. Save the image first, then drop or choose the file."),
        ("text/plain", "No image found. Drop or paste an image file."),
    ],
)
def test_a_dropped_link_or_text_gets_a_visible_message(
    new_page: NewPage, photos: SimpleNamespace, kind: str, message: str
) -> None:
    page = new_page()
    page.evaluate(
        """kind => {
            const dataTransfer = new DataTransfer();
            dataTransfer.setData(kind, "https://example.org/cat.jpg");
            const event = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer });
            document.querySelector("#zone").dispatchEvent(event);
        }""",
        kind,
    )
    expect(page.locator("#message")).to_be_visible()
    expect(page.locator("#message")).to_have_text(message)
    expect(page.get_by_role("status")).to_have_text(message)
    choose(page, photos.red[0])
    answers(page, 1)
    expect(page.locator("#message")).to_be_hidden()


def test_a_photo_is_enlarged_by_mouse_and_keyboard(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page()
    choose(page, photos.red[0])
    answers(page, 1)
    dialog = page.get_by_role("dialog", name="red.000.jpg")
    page.locator(".card img").click()
    expect(dialog).to_be_visible()
    picture = dialog.get_by_role("img", name="red.000.jpg")
    expect(picture).to_have_js_property("naturalWidth", 56)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Enlarge red.000.jpg").press("Enter")
    expect(dialog).to_be_visible()
    dialog.get_by_role("button", name="Close").press("Enter")
    expect(dialog).to_be_hidden()


@pytest.mark.parametrize("classes", [2, 30])
def test_the_picture_that_the_model_saw_is_complete(new_page: NewPage, photos: SimpleNamespace, classes: int) -> None:
    page = new_page(viewport={"width": 1440, "height": 900})
    crop = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg=="
    shares = {f"class {i}": 1 / classes for i in range(classes)}
    row = {"file": "a", "label": "class 0", "confidence": 1 / classes, "probabilities": shares, "width": 5, "height": 4}
    body = json.dumps({"predictions": [row | {"format": "GIF", "notes": [], "crop": crop}]})
    answer_with(page, {"status": 200, "body": body, "content_type": "application/json"})
    choose(page, photos.red[0])
    answers(page, 1)
    figure, picture = (page.locator(selector).bounding_box() for selector in (".crop", ".crop img"))
    assert figure
    assert picture
    assert picture["width"] == pytest.approx(picture["height"], abs=1)
    assert picture["width"] == pytest.approx(figure["width"], abs=1)
    assert page.locator(".crop img").evaluate("image => getComputedStyle(image).objectFit") == "contain"


def test_forced_colors_show_the_current_page(new_page: NewPage) -> None:
    page = new_page(forced_colors="active")
    border = "link => getComputedStyle(link).borderBottomStyle"
    assert page.get_by_role("link", name="Classify").evaluate(border) == "solid"
    assert page.get_by_role("link", name="Gallery").evaluate(border) == "none"


def test_later_results_come_first_and_the_earlier_ones_stay(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page()
    choose(page, photos.red[0])
    answers(page, 1)
    choose(page, photos.blue[0], photos.blue[1])
    names = [heading.split(".jpg")[0] for heading in answers(page, 3)]
    assert names == ["blue.000", "blue.001", "red.000"]
    page.get_by_role("button", name="Clear all").click()
    expect(page.locator("#results")).to_be_hidden()
    expect(page.locator("#files")).to_be_focused()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_no_button_moves_when_photos_are_classified(new_page: NewPage, photos: SimpleNamespace, size: dict[str, int]) -> None:
    """The form keeps its place, and so do the results while others are classified."""
    page = new_page(viewport=size)
    form, results = "#zone .button, #zone input", "#results-title, #clear, #zone .button"
    before = positions(page, form)
    waiting: list[Route] = []
    page.route("**/predict?*", lambda route: waiting.append(route))
    batches = [photos.red[:1], photos.blue[:4], [photos.bad]]
    for number, batch in enumerate(batches, start=1):
        with page.expect_request("**/predict?*"):
            choose(page, *batch)
        expect(page.locator("#progress")).to_be_visible()
        page.evaluate("scrollTo(0, 0)")  # the first result may be below the window
        during = positions(page, results)
        waiting.pop().continue_()
        answers(page, sum(map(len, batches[:number])))
        expect(page.locator("#progress")).to_be_hidden()
        assert positions(page, results) == during
        assert positions(page, form) == before
    put(page, "drop")
    expect(page.locator("#message")).to_be_visible()
    assert positions(page, form) == before


def test_photos_above_the_limit_of_a_request_are_sent_in_several(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page()
    requested = answer_with(page)
    choose(page, *photos.red[:5], *photos.blue[:5])
    assert len(answers(page, 10)) == 10
    assert len(requested) == 3
    assert page.locator(".card.bad").count() == 0


def test_a_file_that_is_too_large_is_not_sent(new_page: NewPage, photos: SimpleNamespace, tmp_path: Path) -> None:
    page = new_page()
    requested = answer_with(page)
    (tmp_path / "huge.jpg").write_bytes(bytes(1_100_000))
    choose(page, tmp_path / "huge.jpg", photos.red[0])
    answers(page, 2)
    expect(page.locator(".card").first).to_contain_text("The file exceeds the 1 MB limit. Choose a smaller one.")
    assert len(requested) == 1


def test_a_photo_is_chosen_by_keyboard_and_its_result_announced(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.locator("#files").evaluate("input => input === document.activeElement"):
            break
    expect(page.get_by_label("Choose photos")).to_be_focused()
    outline = page.locator("label[for=files]").evaluate("label => getComputedStyle(label).outlineStyle")
    assert outline == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    assert chooser.value.is_multiple()
    chooser.value.set_files(photos.red[0])
    answers(page, 1)
    expect(page.get_by_role("status")).to_contain_text("red.000.jpg: red,")
    expect(page.get_by_label("Choose photos")).to_be_focused()


def test_on_a_phone_a_photo_can_be_taken(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page(**PHONE)
    camera = page.get_by_label("Take a photo")
    expect(page.get_by_text("Take a photo")).to_be_visible()
    expect(camera).to_have_attribute("capture", "environment")
    choose(page, photos.red[0], by="#camera")
    answers(page, 1)
    expect(page.get_by_text("Take a photo")).to_be_visible()
    desktop = new_page()
    expect(desktop.get_by_text("Take a photo")).to_be_hidden()


def test_the_form_works_without_javascript(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page(java_script_enabled=False)
    choose(page, photos.red[0], photos.bad)
    page.get_by_role("button", name="Classify").click()
    assert len(answers(page, 2)) == 2
    assert page.url.endswith("/#results")
    page.get_by_role("button", name="Classify").click()
    expect(page.get_by_role("alert")).to_contain_text("Choose at least one photo, then press Classify.")


# Failures


def test_a_request_is_retried_after_the_retry_after_of_a_busy_server(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page(has_clock=True)
    busy = problem(503, "64 photos are waiting.", **{"Retry-After": "3600"})
    requested = answer_with(page, busy)
    choose(page, photos.red[0])
    expect(page.locator(".card.waiting")).to_contain_text("The server is busy. Retrying in 3600 s.")
    page.clock.fast_forward(3_000_000)
    assert len(requested) == 1
    page.clock.fast_forward(600_000)
    assert "red" in answers(page, 1)[0]
    assert len(requested) == 2


def test_a_temporary_failure_can_be_retried(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page()
    answer_with(page, problem(504, "The answer was not there within 10 ms."))
    choose(page, photos.red[0])
    expect(page.locator(".card.bad")).to_contain_text("not there within")
    page.get_by_role("button", name="Try again").press("Enter")
    expect(page.locator(".card h3")).to_be_focused()
    assert "red" in answers(page, 1)[0]
    assert page.locator(".card.bad").count() == 0


def test_an_unexpected_response_is_shown_with_its_status(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page()
    page.route("**/predict?*", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>", content_type="text/html"))
    choose(page, photos.red[0])
    expect(page.locator(".card.bad")).to_contain_text("The server returned status 502.")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_of_many_classes_ten_are_shown_and_the_others_on_demand(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page()
    shares = {f"kind <b>{i}</b>": i / 1e6 for i in range(29)} | {"kind <b>29</b>": 1}
    row = {"file": "a", "label": "kind <b>29</b>", "confidence": 1, "probabilities": shares, "width": 5, "height": 4}
    body = json.dumps({"predictions": [row | {"format": "GIF", "notes": ["It has several frames."], "crop": ""}]})
    answer_with(page, {"status": 200, "body": body, "content_type": "application/json"})
    choose(page, photos.red[0])
    answers(page, 1)
    expect(page.locator(".bar:visible")).to_have_count(10)
    expect(page.locator(".bar").first).to_contain_text("kind <b>29</b>")
    expect(page.locator(".confidence")).to_have_text(">99.9%")  # nothing is certain, however it is rounded on its way
    expect(page.locator(".bar-value").nth(1)).to_have_text("<0.1%")
    expect(page.locator(".note")).to_have_text("It has several frames.")
    page.get_by_text("Show all 30").press("Enter")
    expect(page.locator(".bar:visible")).to_have_count(30)


def test_a_key_is_remembered_for_the_session_and_can_be_forgotten(
    browser: Browser, tiny_bundle: SimpleNamespace, photos: SimpleNamespace
) -> None:
    with serve(tiny_bundle.path, api_keys="ann:sesame") as keyed, open_pages(browser, keyed.url) as open_page:
        page = open_page()
        choose(page, photos.red[0])
        expect(page.locator(".card.bad")).to_contain_text("Enter your API key above.")
        expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill("sesame")
        page.get_by_role("button", name="Try again").click()
        assert "red" in answers(page, 1)[0]
        page.reload()
        expect(page.get_by_label("API key")).to_have_value("sesame")
        page.get_by_role("button", name="Forget key").click()
        page.reload()
        expect(page.get_by_label("API key")).to_have_value("")
        expect(page.get_by_role("button", name="Forget key")).to_be_hidden()


# Layout and accessibility


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["phone", "desktop"])
def test_every_page_is_accessible_and_fits(new_page: NewPage, photos: SimpleNamespace, scheme: str, device: str) -> None:
    page = new_page(color_scheme=scheme, reduced_motion="reduce", **(PHONE if device == "phone" else {}))
    for name in ("home", "answers", "model", "docs"):
        if name == "answers":
            choose(page, photos.red[0], photos.bad, photos.blue[0])
            answers(page, 3)
        elif name != "home":
            page.goto(f"/{name}")
        check_accessibility(page, f"{name}-{device}-{scheme}")
    assert (
        page.evaluate("getComputedStyle(document.body).backgroundColor")
        == {
            "light": "rgb(246, 245, 241)",
            "dark": "rgb(21, 22, 20)",
        }[scheme]
    )


def test_the_narrowest_phone_has_room_and_targets_for_thumbs(new_page: NewPage, photos: SimpleNamespace) -> None:
    page = new_page(viewport={"width": 320, "height": 600}, has_touch=True, is_mobile=True)
    choose(page, photos.red[0], photos.bad)
    answers(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    for target in page.locator("nav a, .button:visible").all():
        box = target.bounding_box()
        assert box is not None
        assert box["height"] >= 44
        assert box["width"] >= 44

"""The complete loop in a browser: find mislabeled photos, correct their labels, train again and compare the models."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import Browser, expect

from tests.helpers.browser import DESKTOP, TIMEOUT_MS
from tests.helpers.server import Server, poll, serve
from tests.helpers.tiny_network import color_folder, finetune, registered, save_weights

pytestmark = pytest.mark.slow

MISLABELED = 3  # of each class
ROOM_LEFT = """select => {
  const style = getComputedStyle(select), context = document.createElement("canvas").getContext("2d");
  context.font = style.font;
  const arrow_px = 20, around_px = parseFloat(style.paddingLeft) + parseFloat(style.paddingRight) + arrow_px;
  return select.clientWidth - around_px - context.measureText(select.selectedOptions[0].text).width;
}"""
OUTCOMES = {(True, True): "both-correct", (False, True): "fixed", (True, False): "broke", (False, False): "both-incorrect"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Photos, some of them in the folder of the other class. ``train(name)`` trains and merges a bundle."""
    root = tmp_path_factory.mktemp("loop")
    data = color_folder(root / "data", train=8, valid=8)
    for label, other in (("blue", "red"), ("red", "blue")):
        for number in range(MISLABELED):
            photo = data / "valid" / label / f"{label}.{number:03d}.jpg"
            photo.rename(data / "valid" / other / f"odd-{photo.name}")

    def train(name: str, *flags: object) -> str:
        with registered():
            weights = save_weights(root / "tiny.pth")
            words = ("--data-dir", data, "--backbone", "tiny", "--weights", weights, "--output-dir", root / f"{name}-run")
            message = run("train", *words, "--export", "head", *flags)
            run("merge", root / f"{name}-run" / "bundle", root / name, "--weights", weights)
        return message

    return SimpleNamespace(root=root, data=data, train=train)


def run(*words: object) -> str:
    code, message, failed = finetune(*words)
    assert code == 0, failed
    return message


def read(file: Path) -> dict[str, dict[str, str]]:
    """Return the rows of a CSV file by photo."""
    with file.open(newline="") as opened:
        return {row["photo"]: row for row in csv.DictReader(opened)}


def wait(server: Server) -> None:
    poll(lambda: server.get("/gallery/photos.json").status == 200)


def test_corrected_labels_improve_the_retrained_model(browser: Browser, made: SimpleNamespace) -> None:
    made.train("old", "--epochs", 1, "--lr", 1e-6)  # too little training, so that the next model is better
    old, new = made.root / "old", made.root / "new"
    settings = {"data_dir": made.data, "database_url": f"sqlite:///{made.root / 'reviews.db'}"}
    context = browser.new_context(**DESKTOP, accept_downloads=True)
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    heading, state = page.get_by_role("heading", level=1), page.locator("#state")

    with serve(old, **settings) as server:
        wait(server)
        a = server.get("/models").json()["models"][0]["version"]
        wrong = server.get("/gallery/photos.json?sort=loss&outcome=incorrect").json()["rows"]
        odd = {row["photo"]: row for row in wrong if "/odd-" in row["photo"]}
        truth = {photo: "blue" if "/odd-blue" in photo else "red" for photo in odd}
        first = next(iter(odd))
        page.goto(f"{server.url}/gallery/photos?sort=loss&outcome=incorrect")
        page.locator(f'a[href*="/gallery/photo?"][href*="{odd[first]["sha256"]}"]').first.click()
        for photo, row in odd.items():
            if photo != first:
                page.goto(f"{server.url}{row['page']}")
            expect(heading).to_have_text(Path(photo).name)
            page.wait_for_load_state()  # keys are handled only once the page is loaded
            page.get_by_label("Save and go to the next photo").uncheck()
            key = "1" if truth[photo] == "blue" else "2"
            page.keyboard.press(key)
            expect(state).to_contain_text(f"relabeled to {truth[photo]}.")
            if photo == first:
                page.keyboard.press("u")
                expect(state).to_contain_text("Not reviewed yet.")
                page.keyboard.press(key)
                expect(state).to_contain_text(f"relabeled to {truth[photo]}.")
        with page.expect_download() as download:
            page.locator('a[href$="/gallery/reviews.csv"]').first.click()
        reviews = made.root / "reviews.csv"
        download.value.save_as(reviews)
    decided = {photo: row["new_label"] for photo, row in read(reviews).items()}
    assert decided == truth

    message = made.train("new", "--reviews", reviews)
    assert f"{len(odd)} reviews ({len(odd)} relabeled, 0 confirmed" in message
    before, after = read(old / "predictions.csv"), read(new / "predictions.csv")
    assert before.keys() == after.keys()
    truth = {photo: decided.get(photo, row["label"]) for photo, row in before.items()}
    right = {photo: tuple(table[photo]["predicted"] == truth[photo] for table in (before, after)) for photo in before}
    numbers = Counter(OUTCOMES[both] for both in right.values())
    assert numbers["fixed"], "the models agree on every photo"

    with serve(new, evaluations=old, **settings) as server:
        wait(server)
        b = server.get("/models").json()["models"][0]["version"]
        page.goto(f"{server.url}/compare?a={a}&b={b}")
        for role, version in (("Baseline", a), ("Candidate", b)):
            expect(page.locator("main")).to_contain_text(re.compile(rf"{role}: \S+ {version}"))
        page.set_viewport_size({"width": 390, "height": 844})
        for choice in page.locator("select").all():
            assert choice.evaluate(ROOM_LEFT) > 0, "the selected model is cut off on a phone"
        page.set_viewport_size({"width": 1280, "height": 900})
        for change in OUTCOMES.values():
            link = page.locator(f'a[href*="/gallery/photos?"][href*="change={change}"]').first
            if numbers[change]:
                expect(link).to_contain_text(str(numbers[change]))
            grid = server.get(f"/gallery/photos.json?model={b}&baseline={a}&change={change}").json()["rows"]
            assert {row["photo"] for row in grid} == {photo for photo, both in right.items() if OUTCOMES[both] == change}
        page.locator('a[href*="change=fixed"]').first.click()
        fixed = next(photo for photo, both in right.items() if OUTCOMES[both] == "fixed")
        page.locator(f'a[href*="/gallery/photo?"][href*="{after[fixed]["sha256"]}"]').first.click()
        expect(heading).to_have_text(Path(fixed).name)
        expect(state).to_contain_text("Correct")
    context.close()

"""The whole loop in a real browser: find what is wrong, put its label right, train again, and see what flipped."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import Browser, expect, sync_playwright
from serving import Server, poll, serve
from tiny import colour_folder, finetune, registered, save_weights

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MISLABELLED = 3
OUTCOMES = ("both-right", "fixed", "broke", "both-wrong")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A bundle of photos some of which lie in the wrong folder, and ``train``, which makes another in the same way."""
    root = tmp_path_factory.mktemp("loop")
    data = colour_folder(root / "data", train=8, valid=6)
    for number in range(MISLABELLED):
        (data / "valid" / "blue" / f"blue.{number:03d}.jpg").rename(data / "valid" / "red" / f"odd.{number:03d}.jpg")
    weights = save_weights(root / "tiny.pth")

    def train(name: str, *flags: object) -> tuple[Path, str]:
        run = root / name
        with registered():
            words = ("--data-dir", data, "--backbone", "tiny", "--weights", weights, "--output-dir", run)
            code, said, failed = finetune("train", *words, "--export", "head", *flags)
            assert code == 0, failed
            code, _, failed = finetune("join", run / "bundle", root / f"{name}-whole", "--weights", weights)
            assert code == 0, failed
        return root / f"{name}-whole", said

    return SimpleNamespace(root=root, data=data, train=train)


def right_and_wrong(bundle: Path) -> dict[str, bool]:
    """Photo -> whether the bundle's own table has it right, under the label that it was evaluated with."""
    with (bundle / "predictions.csv").open(newline="") as file:
        return {row["photo"]: row["label"] == row["predicted"] for row in csv.DictReader(file)}


def wait(server: Server) -> None:
    poll(lambda: server.get("/gallery/photos.json").status == 200)


def test_what_is_found_wrong_is_put_right_and_the_new_model_shows_it(browser: Browser, made: SimpleNamespace) -> None:
    old, _ = made.train("old")
    settings = {"data": made.data, "database_url": f"sqlite:///{made.root / 'reviews.db'}"}
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(30_000)
    page = context.new_page()
    with serve(old, **settings) as server:
        wait(server)
        wrong = server.get("/gallery/photos.json?sort=loss&verdict=wrong").json()["rows"]
        odd = [row for row in wrong if "/odd." in row["photo"]]
        assert odd, "the painted photos are too hard for the tiny network"
        page.goto(f"{server.url}/gallery/photos?sort=loss&verdict=wrong")
        page.locator(f'a[href*="/gallery/photo?"][href*="{odd[0]["sha256"]}"]').first.click()
        for number, row in enumerate(odd):
            if number:
                page.goto(f"{server.url}{row['page']}")
            expect(page.get_by_role("heading", level=1)).to_have_text(Path(row["photo"]).name)
            page.get_by_label("Save and go to the next photo").uncheck()
            page.keyboard.press("1")  # blue, red
            expect(page.locator("#state")).to_contain_text("relabelled it blue.")
            if number == 0:
                page.keyboard.press("u")
                expect(page.locator("#state")).to_contain_text("Not reviewed yet.")
                page.keyboard.press("1")
                expect(page.locator("#state")).to_contain_text("relabelled it blue.")
        link = page.get_by_role("link", name="reviews.csv")
        with page.expect_download() as download:
            link.click()
        reviews = made.root / "reviews.csv"
        download.value.save_as(reviews)
    with reviews.open(newline="") as file:
        decided = {row["photo"]: row["new_label"] for row in csv.DictReader(file)}
    assert decided == {row["photo"]: "blue" for row in odd}

    new, said = made.train("new", "--reviews", reviews)
    assert f"{len(odd)} labels changed" in said
    before, after = right_and_wrong(old), right_and_wrong(new)
    assert before.keys() == after.keys()
    flips = Counter((before[photo], after[photo]) for photo in before)
    assert sum(after[row["photo"]] for row in odd) > 0, "nothing flipped, so that nothing would be seen"

    with serve(new, evaluations=old, **settings) as server:
        wait(server)
        versions = {model["version"] for model in server.get("/models").json()["models"]}
        a = wrong[0]["page"].partition("model=")[2].partition("&")[0]
        (b,) = versions
        page.goto(f"{server.url}/compare?a={a}&b={b}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        expected = dict(zip(OUTCOMES, (flips[pair] for pair in ((True, True), (False, True), (True, False), (False, False))), strict=True))
        for change, photos in expected.items():
            links = page.locator(f'a[href*="/gallery/photos?"][href*="change={change}"]')
            if photos:
                expect(links.first).to_contain_text(str(photos))
            rows = server.get(f"/gallery/photos.json?model={b}&vs={a}&change={change}").json()
            assert rows["total"] == photos
        page.locator('a[href*="change=fixed"]').first.click()
        for row in odd:
            if after[row["photo"]]:
                expect(page.locator(f'a[href*="/gallery/photo?"][href*="{row["sha256"]}"]').first).to_be_visible()
    context.close()

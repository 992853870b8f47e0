"""The studio in a browser: drop two folders of drawn pictures, and look at the dataset. Skipped without Chromium."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import Browser, expect

from finetune.data.synthetic.dataset import draw_image
from tests.helpers.browser import PHONE, check_accessibility, drop, open_pages
from tests.helpers.server import Server, serve

pytestmark = pytest.mark.slow
COUNT = 3


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tiny_bundle.path, studio=1, studio_dir=tmp_path_factory.mktemp("studio"), studio_min_free_mb=0) as server:
        yield server


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for label in ("cats", "dogs"):
        (root / label).mkdir()
        for number in range(COUNT):
            draw_image(label, rng=random.Random(f"{label}{number}")).save(root / label / f"{number}.jpg", quality=88)
    for number in range(400):  # a browser returns at most 100 entries of a folder at a time
        (root / "cats" / f".hidden{number}").touch()
    (root / "cats" / "notes.txt").write_text("no photo")
    return root


def test_two_dropped_folders_become_a_data_set(browser: Browser, server: Server, folders: Path) -> None:
    with open_pages(browser, server.url) as open_page:
        page = open_page("/studio")
        check_accessibility(page, "studio-start")
        page.fill("#name", "pets")
        drop(page, folders / "cats", folders / "dogs")
        expect(page.locator("#upload-problem li")).to_have_text("cats/notes.txt: This is not an image.")
        page.click("#upload-problem a")
        expect(page.locator("h1")).to_have_text("pets")
        expect(page.locator(".lead")).to_have_text(f"{2 * COUNT} photos in 2 classes.")
        expect(page.locator(".class-row img")).to_have_count(2 * COUNT)
        check_accessibility(page, "studio-dataset")

        page.click("h2 >> text=cats")
        page.keyboard.press("Tab")
        page.locator(".pick input").first.check()
        expect(page.locator("[data-count]")).to_have_text("1")
        check_accessibility(page, "studio-photos")
        page.keyboard.press("1")
        expect(page.locator(".undo-bar p")).to_have_text("1 photo moved to dogs.")
        expect(page.locator(".pick")).to_have_count(COUNT - 1)
        page.click(".undo-bar button")
        expect(page.locator(".pick")).to_have_count(COUNT)

        again = open_page("/studio/datasets/pets", **PHONE)
        (folders / "cats" / "notes.txt").unlink(missing_ok=True)
        drop(again, folders / "cats", folders / "dogs")
        again.wait_for_load_state("networkidle")
        expect(again.locator(".lead")).to_have_text(f"{2 * COUNT} photos in 2 classes.")
        check_accessibility(again, "studio-dataset-phone")


def test_a_data_set_is_created_without_javascript(browser: Browser, server: Server, folders: Path) -> None:
    with open_pages(browser, server.url) as open_page:
        page = open_page("/studio", java_script_enabled=False)
        page.fill("#name", "plain")
        page.click("text=Create, then add photos")
        expect(page).to_have_url(re.compile("/studio/datasets/plain$"))
        page.fill("#new-class", "cats")
        page.set_input_files("#new-class-files", sorted((folders / "cats").glob("*.jpg")))
        page.locator(".new-class button").click()
        expect(page.locator(".lead")).to_have_text(f"{COUNT} photos in 1 class.")

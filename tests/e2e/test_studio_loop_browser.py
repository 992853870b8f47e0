"""The loop in a browser: drop photos, check them, train, correct the mistakes, train again, compare, put live and roll back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from service.settings import SHIPPED_BUNDLE
from tests.helpers.browser import check_accessibility, drop, open_pages
from tests.helpers.painted_pictures import COPY, Pictures, paint_pictures
from tests.helpers.server import Server, poll, serve

pytestmark = pytest.mark.slow

# Whether the curve has a later last epoch than at the last call in the same document.
CURVE_MOVED = """() => {
    const epoch = Number(document.querySelector(".chart svg")?.ariaLabel.match(/after epoch (\\d+)/)?.[1] ?? 0);
    const moved = epoch > window.epoch && window.epoch > 0;
    window.epoch = epoch;
    return moved;
}"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return paint_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("studio")
    settings = {"studio": 1, "studio_dir": folder / "studio", "studio_min_free_mb": 0, "studio_niceness": 0}
    with serve(SHIPPED_BUNDLE, database_url=f"sqlite:///{folder / 'reviews.db'}", **settings) as server:
        yield server


def train(page: Page, name: str, *, epochs: int) -> None:
    """Start the training of the form."""
    page.get_by_label("Epochs").fill(str(epochs))
    page.get_by_label("Name of the run").fill(name)
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("h1")).to_have_text(name)


def version_of(page: Page) -> str:
    return page.locator("dt:text-is('Version') + dd").inner_text()


def test_the_loop(browser: Browser, server: Server, pictures: Pictures) -> None:
    photo = (pictures.root / "dogs" / "00.jpg").read_bytes()

    def predicted_by() -> str:
        return str(server.post(photo).json()["model"]["version"])

    shipped = predicted_by()
    with open_pages(browser, server.url) as open_page:
        page = open_page("/studio")
        page.get_by_label("Name of the dataset").fill("pets")
        drop(page, pictures.root / "cats", pictures.root / "dogs")
        expect(page.locator(".lead")).to_have_text(f"{2 * pictures.count + 1} photos in 2 classes.")

        page.get_by_role("link", name="Check the photos").click()
        page.get_by_role("button", name="Check the photos").click()
        expect(page.locator(".finding h2")).to_have_text("The same photo several times in a class 1")
        expect(page.locator(".finding input:checked")).to_have_value(COPY)
        check_accessibility(page, "studio-audit")
        page.get_by_role("button", name="Leave out the selected photos").click()
        expect(page.locator(".undo-bar", has_text="1 photo left out")).to_be_visible()
        page.get_by_role("link", name="Train", exact=True).click()
        train(page, "first", epochs=500)
        page.wait_for_function(CURVE_MOVED)
        expect(page.get_by_role("heading", name="Result")).to_be_visible()
        check_accessibility(page, "studio-run")
        first = version_of(page)

        page.get_by_role("link", name="Review the mistakes").click()
        wrong = page.locator(".tile", has=page.locator(",".join(f'[title="{name}"]' for name in pictures.mislabeled)))
        expect(wrong).to_have_count(len(pictures.mislabeled))
        for tile in wrong.all():
            tile.get_by_role("checkbox").check()
        page.get_by_role("button", name="As predicted").click()
        expect(page.locator("#batch-status")).to_have_text(f"Labeled {len(pictures.mislabeled)} photos as predicted.")
        page.get_by_role("link", name="Back to queues").click()
        page.get_by_role("link", name=f"Train again with {len(pictures.mislabeled)} reviews").click()
        expect(page.get_by_label("Data", exact=True)).to_have_value("dataset:pets")
        expect(page.get_by_label("Apply the reviews")).to_be_checked()
        train(page, "second", epochs=20)
        expect(page.get_by_role("heading", name="Result")).to_be_visible()
        second = version_of(page)
        expect(page.locator(".lead")).to_contain_text(f"with {len(pictures.mislabeled)} reviews")

        page.get_by_role("link", name="Runs").click()
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("tr.differs", has_text="Reviews").locator("td")).to_have_text(["0", "4"])
        expect(page.locator("tr.differs", has_text="Epochs").locator("td")).to_have_text(["500", "20"])
        tops = [page.get_by_label(name).bounding_box() for name in ("First", "Second")]
        assert len({top and top["y"] for top in tops}) == 1, "the two runs are chosen in one row"
        check_accessibility(page, "studio-compare")
        page.get_by_role("link", name="Compare them photo by photo").click()
        expect(page.locator(".figures")).to_contain_text(f"Photos in common{2 * pictures.count // 5}")
        page.go_back()
        page.get_by_role("link", name="second", exact=True).first.click()

        page.get_by_role("button", name="Put live").click()
        expect(page.get_by_role("alert")).to_contain_text("agrees with the current one on 0 of the last 1 image,")
        page.get_by_label("Put it live anyway").check()
        page.get_by_role("button", name="Put live").click()
        expect(page.get_by_role("heading", name="This model is live")).to_be_visible()
        poll(lambda: {predicted_by() for _ in range(8)} == {second})
        page.get_by_role("button", name="Roll back to").click()
        expect(page.locator(".lead")).to_contain_text(f"{shipped} is live")
        poll(lambda: {predicted_by() for _ in range(8)} == {shipped})
    assert first != second

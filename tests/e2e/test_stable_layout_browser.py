"""The controls of the studio stay where they are while a page changes automatically, and after an action.

The server runs in this process, so that the tests decide when an import or a training goes on. Skipped without Chromium.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from playwright.sync_api import Browser, Page, Route, expect
from werkzeug.serving import make_server

from service import create_app
from service.context import services_of
from service.db.connection import Database
from service.db.training_jobs import CANCELLED, FAILED, claim_job, end_job, get_job, submit_job
from service.settings import Settings
from service.studio import background_tasks
from service.studio.data_sets import DataSet, fingerprint
from service.studio.job_files import JobFiles
from service.studio.training_settings import parse_settings
from service.studio.workspace import Workspace
from tests.conftest import NewDatabase
from tests.helpers.browser import SIZES, NewPage, open_pages, positions
from tests.helpers.server import LONG_TIMEOUTS, poll

pytestmark = pytest.mark.slow

START_TIMEOUT_S = 300
SIZE = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


@dataclass(frozen=True)
class Studio:
    """An application with the studio, its address, and what its runner would write."""

    app: Flask
    url: str
    settings: Settings
    database: Database

    def data_set(self, name: str, photos: dict[str, bytes]) -> DataSet:
        """Create a dataset with photos by path."""
        data_set = DataSet.create(Workspace.of(self.settings), self.settings, name)
        for path, data in photos.items():
            file = data_set.folder / path
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
        return data_set

    def run(self, name: str) -> int:
        """Add a training run that has started."""
        with self.database.write() as connection:
            settings = parse_settings({"backbone": "vgg16"})
            id_ = submit_job(connection, run=name, settings=settings, data="dataset:pets", reviews=0, actor="ann", max_queued=9)
            claim_job(connection, "runner", max_running=9)
        return id_

    def report(self, id_: int, *events: dict[str, Any]) -> None:
        """Write the progress of a run."""
        with self.database.read() as connection:
            path = JobFiles.of(self.settings, get_job(connection, id_)).progress
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps({"time": 1.0, **event}) + "\n" for event in events)

    def end(self, id_: int, state: str, reason: str = "") -> None:
        with self.database.write() as connection:
            end_job(connection, id_, state, reason=reason)


@pytest.fixture(scope="module")
def studio(
    tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory, new_database: NewDatabase
) -> Iterator[Studio]:
    with new_database("sqlite") as url:
        folder = tmp_path_factory.mktemp("studio")
        settings = Settings(
            bundle=tiny_bundle.path, studio=True, studio_dir=folder, studio_min_free_mb=0, database_url=url, **LONG_TIMEOUTS
        )
        app = create_app(settings)
        services_of(app).model_manager.wait(START_TIMEOUT_S)
        poll(lambda: app.test_client().get("/studio/jobs").status_code == 200)
        server = make_server("127.0.0.1", 0, app, threaded=True)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Studio(app, f"http://127.0.0.1:{server.server_port}", settings, Database(url, timeout_s=300))
        server.shutdown()
        services_of(app).model_manager.close()


@pytest.fixture
def new_page(browser: Browser, studio: Studio) -> Iterator[NewPage]:
    with open_pages(browser, studio.url) as open_page:
        yield open_page


@pytest.fixture(scope="module")
def photo(tiny_bundle: SimpleNamespace) -> bytes:
    return next(iter(sorted((tiny_bundle.photos / "red").iterdir()))).read_bytes()


def pets(studio: Studio, name: str, photo: bytes, *, count: int = 3) -> DataSet:
    return studio.data_set(name, {f"{class_}/{n}.jpg": photo for class_ in ("cats", "dogs") for n in range(count)})


def center(page: Page, control: str) -> tuple[float, float]:
    box = page.locator(control).bounding_box()
    assert box
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def moved(page: Page, before: dict[str, list[int]]) -> dict[str, tuple[list[int], list[int]]]:
    """Return the controls of the page that were elsewhere before."""
    now = positions(page)
    assert len(before.keys() & now.keys()) > 1
    return {name: (before[name], now[name]) for name in before.keys() & now.keys() if before[name] != now[name]}


@SIZE
def test_an_upload_and_its_problems_move_nothing(new_page: NewPage, photo: bytes, size: dict[str, int]) -> None:
    page = new_page("/studio", viewport=size)
    page.fill("#name", f"uploaded {size['width']}")
    before = positions(page)
    waiting: list[Route] = []
    page.route("**/photos/**", lambda route: waiting.append(route))
    with page.expect_request("**/photos/**"):
        page.set_input_files("#files-input", [{"name": f"{n}.jpg", "mimeType": "image/jpeg", "buffer": photo} for n in (1, 2)])
    expect(page.locator("#upload")).to_be_in_viewport()
    assert moved(page, before) == {}
    page.keyboard.press("Shift")  # the page is in use, so that it does not change automatically
    poll(lambda: page.evaluate("1") and len(waiting) == 2)
    waiting[0].fulfill(status=415, json={"detail": "This is not an image."})
    waiting[1].continue_()
    expect(page.locator("#upload-problem li")).to_have_text(["1.jpg: This is not an image."])
    expect(page.locator("#upload-problem")).to_be_in_viewport()
    assert moved(page, before) == {}
    page.click("#upload-close")
    assert moved(page, before) == {}


@SIZE
def test_the_end_of_an_import_moves_nothing_while_the_page_is_used(
    new_page: NewPage, studio: Studio, photo: bytes, size: dict[str, int]
) -> None:
    data_set = pets(studio, f"imported {size['width']}", photo)
    may_end = threading.Event()

    def work(report: background_tasks.Report) -> str:
        report("Adding the photos", 2, 2)
        assert may_end.wait(START_TIMEOUT_S)
        (data_set.folder / "birds").mkdir()
        (data_set.folder / "birds" / "1.jpg").write_bytes(photo)
        return "1 photo was added."

    background_tasks.start(data_set, "import", work)
    used, idle = (new_page(f"/studio/datasets/{data_set.name}", viewport=size) for _ in range(2))
    used.fill("#new-class", "fish")
    before = positions(used)
    expect(used.locator("[data-task]")).to_contain_text("2 of 2")
    may_end.set()
    expect(idle.locator("h2", has_text="birds")).to_be_visible()
    expect(used.locator("[data-task]")).to_have_text("Finished. Show the result")
    assert moved(used, before) == {}
    expect(used.locator("#new-class")).to_have_value("fish")
    used.get_by_role("link", name="Show the result").click()
    expect(used.locator("h2", has_text="birds")).to_be_visible()


@SIZE
def test_a_move_and_its_undo_move_no_button(new_page: NewPage, studio: Studio, photo: bytes, size: dict[str, int]) -> None:
    """Clicks at one position move photo after photo, and at another take the moves back."""
    data_set = pets(studio, f"sorted {size['width']}", photo, count=40)
    page = new_page(f"/studio/datasets/{data_set.name}/photos?class=cats", viewport=size)
    page.mouse.wheel(0, 60)
    poll(lambda: page.evaluate("scrollY") == 60)
    before = positions(page, ".undo-bar button, .toolbar button, .toolbar input")
    to_dogs, undo = (center(page, control) for control in ("[data-shortcut='1']", ".undo-bar button"))

    def expect_photos(count: int) -> None:
        expect(page.locator(".pick")).to_have_count(count)
        page.wait_for_load_state()
        assert positions(page, ".undo-bar button, .toolbar button, .toolbar input") == before

    for left in (39, 38):
        page.locator(".pick input").first.evaluate("box => box.click()")  # it may be below the window
        page.mouse.click(*to_dogs)
        expect_photos(left)
    for left in (39, 40):
        page.mouse.click(*undo)
        expect_photos(left)


@SIZE
def test_an_estimate_does_not_move_the_button_that_starts(
    new_page: NewPage, studio: Studio, photo: bytes, size: dict[str, int]
) -> None:
    pets(studio, f"trained {size['width']}", photo)
    page = new_page("/studio/train", viewport=size)
    before = positions(page)
    assert "button Start training" in before
    page.route("**/estimate.json?*", lambda route: route.fulfill(json={"seconds": 75, "run": "a run with a long name " * 6}))
    page.locator("#epochs").evaluate("field => field.dispatchEvent(new Event('change', { bubbles: true }))")
    expect(page.locator("#estimate")).to_contain_text("About 75 s")
    assert moved(page, before) == {}


@SIZE
def test_the_progress_of_a_run_moves_nothing(new_page: NewPage, studio: Studio, size: dict[str, int]) -> None:
    id_ = studio.run(f"run {size['width']}")
    page = new_page(f"/studio/jobs/{id_}", viewport=size)
    cancel = page.get_by_role("button", name="Cancel the run")
    before = positions(page)
    row = {"train_loss": 0.5, "valid_loss": 0.4, "train_accuracy": 0.75, "valid_accuracy": 0.8, "seconds": 2.0, "epochs": 9}
    studio.report(id_, {"event": "step", "text": "Compiling the frozen layers"})
    expect(page.locator(".now")).to_contain_text("Compiling the frozen layers")
    assert moved(page, before) == {}
    studio.report(id_, {"event": "training", "head": "linear", "epochs": 9, "epoch": 0, "train": 8, "valid": 4})
    for number in (1, 2):
        studio.report(id_, {"event": "epoch", "epoch": number, "best_epoch": number, **row})
        expect(page.locator(".now")).to_contain_text(f"epoch {number + 1} of 9")
        expect(page.locator(".chart").first).to_be_visible()
        assert moved(page, before) == {}
    studio.end(id_, FAILED, "The disk is full.")
    expect(page.get_by_role("button", name="Resume after epoch 2")).to_be_visible()
    assert moved(page, before) == {}
    expect(cancel).to_be_disabled()


@SIZE
def test_a_second_click_on_cancel_does_not_resume(new_page: NewPage, studio: Studio, size: dict[str, int]) -> None:
    id_ = studio.run(f"cancelled {size['width']}")
    page = new_page(f"/studio/jobs/{id_}", viewport=size)
    position = center(page, "text=Cancel the run")
    page.mouse.click(*position)
    expect(page.get_by_role("button", name="Cancel the run")).to_be_disabled()
    studio.end(id_, CANCELLED)
    expect(page.get_by_role("button", name="Start again")).to_be_visible()
    page.mouse.click(*position)
    page.wait_for_load_state("networkidle")
    with studio.database.read() as connection:
        assert get_job(connection, id_).state == CANCELLED


@SIZE
def test_leaving_photos_out_moves_no_button_of_the_findings(
    new_page: NewPage, studio: Studio, photo: bytes, size: dict[str, int]
) -> None:
    data_set = pets(studio, f"checked {size['width']}", photo, count=4)
    names = ["cats/0.jpg", "cats/1.jpg"], ["dogs/0.jpg", "dogs/1.jpg"], ["dogs/2.jpg", "dogs/3.jpg"]
    lists, tables = (
        ("leakage", "conflicts", "empty_classes"),
        ("damaged", "unlabeled", "class_mismatch", "small_classes", "skipped"),
    )
    report = {"duplicates": names, "imbalance": 1.0, "counts": {"train": {"cats": 4, "dogs": 4}}}
    report |= {kind: [] for kind in lists} | {kind: {} for kind in tables}
    photos = (photo for by_split in data_set.classes().values() for rows in by_split.values() for photo in rows)
    data_set.write_state("audit.json", {"report": report, "fingerprint": fingerprint(photos)})
    page = new_page(f"/studio/datasets/{data_set.name}/audit", viewport=size)
    buttons = ".undo-bar button, .finding-actions button"
    page.locator(".finding-actions button").first.scroll_into_view_if_needed()
    before, position = positions(page, buttons), center(page, ".finding-actions button >> nth=0")
    page.locator(".pick input").evaluate_all("boxes => boxes.forEach((box, number) => { box.checked = number === 1; })")
    page.mouse.click(*position)
    expect(page.locator(".undo-bar", has_text="1 photo left out")).to_be_visible()
    expect(page.locator(".undo-bar", has_text="Changed since the last check.")).to_be_visible()
    expect(page.locator(".group")).to_have_count(2)
    assert positions(page, buttons) == before

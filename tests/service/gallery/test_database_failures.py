"""While the review database fails, each page of the gallery says so with 503, and a form loses nothing that was entered."""

from __future__ import annotations

import html
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest
from flask import Flask

from service import create_app
from service.context import services_of
from service.db.connection import REPLACED, UNAVAILABLE
from service.settings import Settings
from tests.helpers.server import START_TIMEOUT_S, poll

pytestmark = pytest.mark.slow

BROWSER = {"Sec-Fetch-Site": "same-origin"}


@dataclass(frozen=True)
class Gallery:
    app: Flask
    file: Path
    row: dict[str, str]


@pytest.fixture
def gallery(tiny_bundle: SimpleNamespace, tmp_path: Path) -> Iterator[Gallery]:
    """The application with pages, its database file, and one of its photos."""
    file = tmp_path / "reviews.db"
    settings = Settings(
        bundle=tiny_bundle.path, data_dir=tiny_bundle.data, database_url=f"sqlite:///{file}", database_timeout_s=0.1
    )
    app = create_app(settings)
    models = services_of(app).model_manager
    models.wait(START_TIMEOUT_S)
    poll(lambda: app.test_client().get("/gallery").status_code == 200)
    rows = app.test_client().get("/gallery/photos.json").get_json()["rows"]
    yield Gallery(app, file, rows[0])
    models.close()


def addresses(gallery: Gallery) -> list[str]:
    """Return an address of each page and export of the gallery. Pictures of a photo in the data folder need no database."""
    photo = urlencode({"photo": gallery.row["photo"], "sha256": gallery.row["sha256"]})
    rules = [rule for rule in gallery.app.url_map.iter_rules() if rule.methods and "GET" in rule.methods]
    paths = [rule.rule for rule in rules if re.match("/gallery(?!/images/)|/compare", rule.rule)]
    queries = {"/gallery/photo": photo, "/gallery/map/photo.json": "id=1"}
    return [f"{path}?{queries[path]}" if path in queries else path for path in paths]


def test_every_page_is_unavailable_without_its_database(gallery: Gallery) -> None:
    client = gallery.app.test_client()
    pages = addresses(gallery)
    assert len(pages) > 10
    for path in pages:
        assert client.get(path).status_code in (200, 302, 404), path
    for file in gallery.file.parent.glob("reviews.db*"):
        file.unlink()
    for path in pages:
        for accept in ("text/html", "application/json"):
            reply = client.get(path, headers={"Accept": accept})
            assert reply.status_code == 503, (path, accept, reply.text[:300])
            assert reply.headers["Retry-After"] == "5"
            if accept == "text/html":
                assert reply.mimetype == "text/html"
                assert reply.text.count(REPLACED) == 1
            assert str(gallery.file) not in reply.text


def test_a_form_that_could_not_be_saved_is_offered_again_with_its_note(gallery: Gallery) -> None:
    client = gallery.app.test_client()
    entered = {
        "photo": gallery.row["photo"],
        "sha256": gallery.row["sha256"],
        "decision": "neither",
        "note": 'a <b>"wolf"</b>\nin snow',
        "reviewer": "Ann",
    }
    other = sqlite3.connect(gallery.file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    rejected = client.post("/gallery/review", data=entered, headers=BROWSER)
    assert (rejected.status_code, rejected.headers["Retry-After"]) == (503, "5")
    assert html.escape(UNAVAILABLE, quote=False) in rejected.text
    assert '<button class="button main">Save again</button>' in rejected.text
    other.execute("ROLLBACK")
    other.close()
    fields = dict(re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)">', rejected.text))
    note = re.search(r'<textarea id="note" name="note"[^>]*>(.*?)</textarea>', rejected.text, re.DOTALL)
    assert note
    again = {name: html.unescape(value) for name, value in {**fields, "note": note[1]}.items()}
    assert {name: again.get(name) for name in entered} == entered
    assert client.post("/gallery/review", data=again, headers=BROWSER).status_code == 303
    (saved,) = client.get(f"/gallery/history.json?sha256={gallery.row['sha256']}").get_json()["history"]
    assert {name: saved[name] for name in ("decision", "note", "reviewer")} == {
        name: entered[name] for name in ("decision", "note", "reviewer")
    }

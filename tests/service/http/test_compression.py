"""Compression and revalidation of text responses, error pages for browsers, and addresses with a trailing slash."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from service import create_app
from service.context import services_of
from service.settings import Settings
from tests.helpers.server import LONG_TIMEOUTS, START_TIMEOUT_S, poll

pytestmark = pytest.mark.slow

GZIP = {"Accept-Encoding": "br;q=1, gzip;q=0.8"}
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}


class BufferedClient(FlaskClient):
    """A client that reads and closes every response."""

    def open(self, *args: Any, **kwargs: Any) -> TestResponse:
        return super().open(*args, **(kwargs | {"buffered": True}))


@pytest.fixture(scope="module")
def client(tiny_bundle: SimpleNamespace, new_database: Any) -> Iterator[FlaskClient]:
    with new_database("sqlite") as url:
        app = create_app(Settings(bundle=tiny_bundle.path, data_dir=tiny_bundle.data, database_url=url, **LONG_TIMEOUTS))
        services_of(app).model_manager.wait(START_TIMEOUT_S)
        poll(lambda: app.test_client().get("/gallery").status_code == 200, within_s=START_TIMEOUT_S)
        yield BufferedClient(app, app.response_class)
        services_of(app).model_manager.close()


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/gallery", "/gallery/photos", "/model", "/static/site.css"])
def test_text_is_compressed_for_clients_that_accept_gzip(client: FlaskClient, path: str) -> None:
    plain, compressed = client.get(path), client.get(path, headers=GZIP)
    assert "Content-Encoding" not in plain.headers
    assert compressed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(compressed.data) == plain.data
    assert compressed.content_length == len(compressed.data) < len(plain.data) / 2
    for response in (plain, compressed):
        assert "Accept-Encoding" in response.headers["Vary"]
    for refusal in ("identity", "gzip;q=0", "br", ""):
        assert client.get(path, headers={"Accept-Encoding": refusal}).data == plain.data
    head = client.head(path, headers=GZIP)
    assert (head.content_length, head.data) == (compressed.content_length, b"")


def test_images_archives_predictions_and_short_responses_are_not_compressed(client: FlaskClient) -> None:
    listing = client.get("/gallery/photos.json", headers=GZIP)  # streamed
    row = listing.get_json()["rows"][0]
    thumbnail = client.get(f"/gallery/images/{row['sha256']}/thumbnail.jpg?photo={row['photo']}", headers=GZIP)
    assert (thumbnail.status_code, thumbnail.data[:2]) == (200, b"\xff\xd8")
    archive = client.get("/gallery/production.zip", headers=GZIP)
    assert zipfile.is_zipfile(io.BytesIO(archive.data))
    prediction = client.post("/predict?crop=1", data=thumbnail.data, content_type="image/jpeg", headers=GZIP)
    assert len(prediction.data) > 1_400
    for response in (listing, thumbnail, archive, prediction, client.get("/health/live", headers=GZIP)):
        assert "Content-Encoding" not in response.headers


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/gallery", "/gallery/photos", "/static/site.css"])
@pytest.mark.parametrize("headers", [{}, GZIP])
def test_a_page_that_has_not_changed_is_not_sent_again(client: FlaskClient, path: str, headers: dict[str, str]) -> None:
    first = client.get(path, headers=headers)
    again = client.get(path, headers=headers | {"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert again.headers["ETag"].removeprefix("W/") == first.headers["ETag"].removeprefix("W/")
    assert client.get(path, headers=headers | {"If-None-Match": '"another"'}).data == first.data


def test_an_unknown_address_is_a_page_for_browsers_and_json_for_programs(client: FlaskClient) -> None:
    for path, status in {"/nope": 404, "/gallery/nope": 404, "/metrics?a=%00": 400}.items():
        page = client.get(path, headers=BROWSER)
        assert (page.status_code, page.mimetype, page.headers["Cache-Control"]) == (status, "text/html", "no-store")
        assert "<h1>" in page.text
        assert page.vary.as_set() >= {"accept"}
        for accept in ("", "*/*", "application/json", "application/json, text/html", "text/plain, */*"):
            response = client.get(path, headers={"Accept": accept})
            assert (response.status_code, response.mimetype) == (status, "application/problem+json"), accept
            assert response.get_json()["status"] == status
    name = client.get("/v2/nope", headers=BROWSER)
    assert (name.status_code, name.get_json().keys()) == (404, {"error"})


def location(response: TestResponse) -> str:
    assert response.status_code == 308
    return response.headers["Location"]


def test_a_trailing_slash_leads_to_the_address_without_it(client: FlaskClient) -> None:
    for path in ("/gallery", "/docs", "/model", "/compare", "/gallery/photos", "/models", "/openapi.json"):
        assert location(client.get(f"{path}/")) == path
        assert location(client.get(f"{path}//")) in (path, f"{path}/")
    assert location(client.get("/docs///")) == "/docs"
    for query in ("class=red&x=%2F", "a=%C3%BC"):
        assert location(client.get(f"/gallery/photos/?{query}")) == f"/gallery/photos?{query}"
    for path in ("/nope/", "/gallery/nope/", "/static/nope/", "/evil.example/", "/predict/"):
        assert client.get(path).status_code == 404, path


def test_the_icon_by_its_fixed_name(client: FlaskClient) -> None:
    response = client.get("/favicon.ico", follow_redirects=True)
    assert (response.status_code, response.mimetype) == (200, "image/svg+xml")


def test_the_openapi_document_stays_valid_json(client: FlaskClient) -> None:
    assert json.loads(gzip.decompress(client.get("/openapi.json", headers=GZIP).data))["openapi"]

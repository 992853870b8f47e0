"""Every route with every method and hostile path segments: no server error, and no file outside the service's own is opened."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from werkzeug.test import EnvironBuilder, TestResponse, run_wsgi_app

import service
from service import create_app
from service.settings import Settings
from tests.helpers.server import PATIENT, START_S, poll

KNOWN_METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW")
STATIC = Path(service.__file__).parent / "static"
CLIMBS = "../" * 30
_opened: list[str] | None = None


def _note_opened(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(args[0], (str, bytes)):
        _opened.append(os.fsdecode(args[0]))


sys.addaudithook(_note_opened)


@contextlib.contextmanager
def opened_files() -> Iterator[list[str]]:
    """Record the paths that this process opens inside the block."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


@pytest.fixture(scope="module")
def app(tiny_bundle: SimpleNamespace, new_database: Any) -> Iterator[Flask]:
    with new_database("sqlite") as url:
        settings = Settings(
            bundle=tiny_bundle.path, data=tiny_bundle.data, database_url=url, admin_keys=("boss:sesame",), **PATIENT
        )
        app = create_app(settings)
        app.extensions["model"].wait(START_S)
        poll(lambda: app.test_client().get("/gallery").status_code == 200, within_s=START_S)
        yield app
        app.extensions["model"].close()


def request(app: Flask, method: str, path: str, query: str = "", **headers: str) -> TestResponse:
    """Send ``path`` as a server passes it on: percent-decoded, its bytes as Latin-1, and not normalized."""
    environ = EnvironBuilder(method=method, query_string=query, headers=headers).get_environ()
    environ["PATH_INFO"] = path.encode("utf-8", "surrogatepass").decode("latin-1")
    return TestResponse(*run_wsgi_app(app, environ, buffered=True), request=None)  # type: ignore[arg-type]


def hostile_segments(secret: Path) -> list[str]:
    """What stands in place of a path's parameter."""
    return [
        "..",
        "../../../etc/passwd",
        f"{CLIMBS}etc/passwd",
        f"{CLIMBS}dev/zero",
        f"{CLIMBS}{secret}",
        os.path.relpath(secret, STATIC),
        str(secret),
        "/etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "..\\..\\etc\\passwd",
        "nofile",
        "\0",
        f"{CLIMBS}etc/passwd\0.css",
        "\r\nSet-Cookie: a=b",
        "\ud800",
        "\udcff",
        "\u202e",
        "a" * 5_000,
    ]


def test_no_method_on_no_route_fails_or_opens_a_file_that_the_path_names(
    app: Flask, tiny_bundle: SimpleNamespace, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the content of another file")
    for rule in sorted({rule.rule for rule in app.url_map.iter_rules()}):
        parameters = re.findall(r"<[^>]+>", rule)
        for segment in hostile_segments(secret) if parameters else [""]:
            path = re.sub(r"<[^>]+>", lambda _, segment=segment: segment, rule)
            for method in KNOWN_METHODS:
                with opened_files() as opened:
                    response = request(app, method, path, Authorization="Bearer sesame")
                assert response.status_code < 500, f"{method} {path!r}: {response.data[:300]!r}"
                assert secret.read_bytes() not in response.data
                for file in opened:
                    resolved = os.path.realpath(file)
                    assert resolved != str(secret), f"{method} {path!r} opened {file}"
                    assert not resolved.startswith(("/etc", "/dev/zero")), f"{method} {path!r} opened {file}"


@pytest.mark.parametrize("method", KNOWN_METHODS)
def test_only_get_and_head_touch_a_static_file(app: Flask, method: str) -> None:
    version = app.extensions["static_versions"]["site.css"]
    with opened_files() as opened:
        response = request(app, method, "/static/site.css", query=f"v={version}")
    assert [Path(file).name for file in opened if Path(file).parent == STATIC] == ["site.css"] * (method in ("GET", "HEAD"))
    assert ("immutable" in response.headers.get("Cache-Control", "")) == (method in ("GET", "HEAD"))


def test_no_request_hashes_a_static_file(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise AssertionError(f"{path} was hashed for a request")

    monkeypatch.setattr("service.web.layout.sha256_of", fail)
    for path in ("/", "/docs", "/static/site.css", "/static/nofile"):
        assert request(app, "GET", path).status_code in (200, 404)
        assert request(app, "OPTIONS", path).status_code == 200

"""Every method on every route, and hostile text everywhere: no server error, and no file that a client names is opened."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from flask import Flask
from werkzeug.test import EnvironBuilder, TestResponse, run_wsgi_app

import service
from service import create_app
from service.context import services_of
from service.db.filter import FACETS
from service.gallery.review import FIELDS
from service.gallery.sidebar import FORM_PARAMS
from service.settings import Settings
from service.web.layout import static_versions
from tests.helpers.server import LONG_TIMEOUTS, START_TIMEOUT_S, poll

pytestmark = pytest.mark.slow

KNOWN_METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW")
FORM_TYPE = "application/x-www-form-urlencoded"
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


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def app(tiny_bundle: SimpleNamespace, new_database: Any, request: pytest.FixtureRequest) -> Iterator[Flask]:
    with new_database(request.param) as url:
        settings = Settings(
            bundle=tiny_bundle.path, data_dir=tiny_bundle.data, database_url=url, admin_keys=("boss:sesame",), **LONG_TIMEOUTS
        )
        app = create_app(settings)
        services_of(app).model_manager.wait(START_TIMEOUT_S)
        poll(lambda: app.test_client().get("/gallery").status_code == 200, within_s=START_TIMEOUT_S)
        yield app
        services_of(app).model_manager.close()


def send(
    app: Flask, method: str, path: str, query: str = "", body: bytes = b"", content_type: str | None = None, **headers: str
) -> TestResponse:
    """Send a request as a server passes it to WSGI: the path percent-decoded, as Latin-1, and not normalized."""
    builder = EnvironBuilder(method=method, input_stream=io.BytesIO(body), content_length=len(body), content_type=content_type)
    environ = builder.get_environ()
    environ["PATH_INFO"] = path.encode("utf-8", "surrogatepass").decode("latin-1")
    environ["QUERY_STRING"] = query
    environ |= {f"HTTP_{name.upper()}": text for name, text in headers.items()}
    return TestResponse(*run_wsgi_app(app, environ, buffered=True), request=None)  # type: ignore[arg-type]


def hostile_segments(secret: Path) -> list[str]:
    """Return hostile values of a path parameter."""
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


def test_no_route_and_method_fails_or_opens_a_file_named_in_the_path(
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
                    response = send(app, method, path, Authorization="Bearer sesame")
                assert response.status_code < 500, f"{method} {path!r}: {response.data[:300]!r}"
                assert secret.read_bytes() not in response.data
                for file in opened:
                    resolved = os.path.realpath(file)
                    assert resolved != str(secret), f"{method} {path!r} opened {file}"
                    assert not resolved.startswith(("/etc", "/dev/zero")), f"{method} {path!r} opened {file}"


@pytest.mark.parametrize("method", KNOWN_METHODS)
def test_only_get_and_head_open_a_static_file(app: Flask, method: str) -> None:
    version = static_versions()["site.css"]
    with opened_files() as opened:
        response = send(app, method, "/static/site.css", query=f"v={version}")
    assert [Path(file).name for file in opened if Path(file).parent == STATIC] == ["site.css"] * (method in ("GET", "HEAD"))
    assert ("immutable" in response.headers.get("Cache-Control", "")) == (method in ("GET", "HEAD"))


def test_no_request_hashes_a_static_file(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise AssertionError(f"{path} was hashed for a request")

    monkeypatch.setattr("service.web.layout.sha256_of", fail)
    for path in ("/", "/docs", "/static/site.css", "/static/nofile"):
        assert send(app, "GET", path).status_code in (200, 404)
        assert send(app, "OPTIONS", path).status_code == 200


# Text that no database stores, that breaks a header, or that is unusual.
UNSTORABLE = ("\0", "half \udcff")
HOSTILE = (*UNSTORABLE, "\r\nSet-Cookie: a=b", "\x01\x7f\x85\u2028\u202e", "%ud800'\";--", "x" * 9_000)
PARAMETERS = (*FACETS, "model", "photo", "sha256", "explain", "saved", "a", "b", "baseline", "change", "sort", "order", "seed")
PARAMETERS += ("per_page", "confidence", "page", *FORM_PARAMS, "unknown")
SECURITY_HEADERS = ("Authorization", "Cookie", "Host", "If_None_Match", "If_Modified_Since", "Inference_Header_Content_Length")
SECURITY_HEADERS += ("Origin", "Range", "Referer", "Sec_Fetch_Site", "X_API_Key", "X_Request_ID")


def quoted(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


def check(response: TestResponse, context: str) -> None:
    assert response.status_code < 500, f"{context}: {response.status_code} {response.data[:300]!r}"


def pages(app: Flask) -> list[str]:
    """Return every path with a GET route, its parameters filled in."""
    sha256 = "0" * 64
    rules = sorted({rule.rule for rule in app.url_map.iter_rules() if "GET" in (rule.methods or ())})
    return [re.sub(r"<[^>]+>", sha256, rule) for rule in rules]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:20])
def test_hostile_text_in_a_query_is_no_server_error(app: Flask, text: str) -> None:
    for path in pages(app):
        check(send(app, "GET", path, quoted(text)), f"{path}?{text!r}")
        for name in PARAMETERS if path.startswith(("/gallery", "/compare")) else ():
            response = send(app, "GET", path, f"{name}={quoted(text)}")
            check(response, f"{path}?{name}={text!r}")
            assert text != "\0" or response.status_code == 400, f"{path}?{name}"
    photo = "live/" + quoted(text)
    for kind in ("thumbnail.jpg", "original.jpg", "crop.png", "attention.png"):
        check(send(app, "GET", f"/gallery/images/{text}/{kind}", f"photo={photo}"), f"{kind} {text!r}")


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:20])
def test_hostile_text_in_a_body_is_no_server_error(app: Flask, text: str) -> None:
    row = json.loads(send(app, "GET", "/gallery/photos.json").data)["rows"][0]
    decision = {"photo": row["photo"], "sha256": row["sha256"], "decision": "note", "note": "a note", "expected_version": ""}
    for name in FIELDS:
        for value in (text, f"class={text}", [text], {text: text}):
            body = json.dumps(decision | {name: value}).encode()
            check(send(app, "POST", "/gallery/review", body=body, content_type="application/json"), f"JSON {name} {value!r}")
        for value in (text, f"class={text}"):
            form = "&".join(f"{key}={quoted(str(word))}" for key, word in (decision | {name: value}).items())
            response = send(app, "POST", "/gallery/review", body=form.encode(), content_type=FORM_TYPE)
            check(response, f"form {name} {value!r}")
    for back in (text, "/gallery" + text, "/gallery/photos?class=" + text):
        form = f"key={quoted(text)}&back={quoted(back)}"
        check(send(app, "POST", "/gallery/key", body=form.encode(), content_type=FORM_TYPE), f"key {back!r}")
    model = json.loads(send(app, "GET", "/models").data)["models"][0]["name"]
    tensor = {"name": "images", "datatype": "BYTES", "shape": [1], "data": ["eA=="]}
    documents: list[tuple[str, Any]] = [
        ("/predict", {"image": text}),
        ("/predict", {"instances": [{"b64": text}, {text: text}]}),
        ("/predict", {text: text}),
        ("/admin/bundle", {"bundle": text}),
        ("/admin/bundle", {"bundle": "x", "allow": [text]}),
        *((f"/v2/models/{model}/infer", {"inputs": [tensor | {name: text}]}) for name in (*tensor, "parameters")),
        (f"/v2/models/{model}/infer", {"inputs": [tensor | {"data": [text]}], "id": text}),
        (f"/v2/models/{model}/infer", {"inputs": [tensor], "outputs": [{"name": text}]}),
        (f"/v2/models/{model}/infer", {"inputs": [tensor], "parameters": {text: text}}),
    ]
    for path, document in documents:
        for body in (json.dumps(document).encode(), json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")):
            response = send(app, "POST", path, body=body, content_type="application/json", Authorization="Bearer sesame")
            check(response, f"{path} {body[:200]!r}")
    name = text.replace("\r\n", "").encode("utf-8", "surrogatepass")
    for path in ("/", "/predict"):
        part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="' + name + b'"\r\n\r\nabc\r\n--x--\r\n'
        check(send(app, "POST", path, body=part, content_type="multipart/form-data; boundary=x"), f"file name {name!r}")


@pytest.mark.parametrize(
    "text", ["\0", "\xff", "\xed\xa0\x80", "a=\xff; key=\xff; reviewer=\xff\0", "x" * 4_000], ids=lambda text: ascii(text)[:20]
)
def test_hostile_bytes_in_a_header_are_no_server_error(app: Flask, text: str) -> None:
    for path in ("/", "/model", "/static/site.css", "/gallery/photos", "/gallery/images/legend.png", "/admin/bundle", "/x"):
        for name in SECURITY_HEADERS:
            check(send(app, "GET", path, **{name: text}), f"GET {path} with {name}: {text!r}")
    for path in ("/", "/predict", "/gallery/review", "/gallery/key", "/admin/bundle"):
        for name in SECURITY_HEADERS:
            check(
                send(app, "POST", path, body=b"key=a", content_type=FORM_TYPE, **{name: text}),
                f"POST {path} with {name}: {text!r}",
            )
        check(send(app, "POST", path, body=b"key=a", content_type=text), f"POST {path} as {text!r}")
        check(send(app, "POST", path, body=b"{}", content_type=f"application/json; charset={text}"), f"POST {path} as {text!r}")
        check(
            send(app, "POST", path, body=b"abc", content_type=f"multipart/form-data; boundary={text}"),
            f"POST {path} as {text!r}",
        )

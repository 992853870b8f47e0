"""Request bodies: JSON above the limits is rejected before it is parsed, odd JSON after it, and the largest request passes."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flask import Flask
from werkzeug.test import TestResponse

from service import create_app
from service.context import services_of
from service.http.errors import Problem
from service.http.request_body import parse_json
from service.settings import Settings
from tests.helpers.server import LONG_TIMEOUTS, START_TIMEOUT_S, poll

MAX_PHOTOS = 4
KEY = {"Authorization": "Bearer sesame"}
Post = Callable[[bytes], TestResponse]


@pytest.fixture(scope="module")
def app(tiny_bundle: SimpleNamespace, new_database: Any) -> Iterator[Flask]:
    with new_database("sqlite") as url:
        settings = Settings(
            bundle=tiny_bundle.path, database_url=url, max_images=MAX_PHOTOS, admin_keys=("boss:sesame",), **LONG_TIMEOUTS
        )
        app = create_app(settings)
        services_of(app).model_manager.wait(START_TIMEOUT_S)
        poll(lambda: app.test_client().get("/gallery").status_code == 200, within_s=START_TIMEOUT_S)
        yield app
        services_of(app).model_manager.close()


@pytest.fixture
def infer(app: Flask) -> str:
    return f"/v2/models/{services_of(app).model_manager.get().bundle.name}/infer"


@pytest.fixture
def no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(text: object) -> None:
        raise AssertionError("the JSON was parsed")

    monkeypatch.setattr("service.http.request_body.json", SimpleNamespace(loads=fail))


def post(app: Flask, path: str, body: bytes | Any) -> TestResponse:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return app.test_client().post(path, data=data, content_type="application/json", headers=KEY)


def rejected(body: bytes, **limits: int) -> Problem:
    with pytest.raises(Problem) as caught:
        parse_json(body, **{"max_values": 1_000, **limits}, hint="Send less.")
    return caught.value


@pytest.mark.parametrize("item", [b"1", b"[]", b"{}", b'{"a":1}', b'"a"', b'","'])
def test_json_at_the_limit_is_parsed_and_above_it_rejected(item: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def list_of(number: int) -> bytes:
        return b"[" + b",".join([item] * number) + b"]"

    def size(body: bytes) -> int:
        return sum(map(body.count, (b"[", b"{", b",")))

    bound = size(list_of(10))
    assert len(parse_json(list_of(10), max_values=bound, hint="Send less.")) == 10
    monkeypatch.setattr("service.http.request_body.json", None)
    problem = rejected(list_of(10), max_values=bound - 1)
    assert (problem.code, problem.status) == ("json_too_large", 413)
    assert f"The JSON has {bound:,} values, the limit is {bound - 1:,}. Send less." in problem.detail


def test_lists_and_objects_have_their_own_limit() -> None:
    assert parse_json(b'[[1,2],{"a":3}]', max_values=9, max_containers=3, hint="") == [[1, 2], {"a": 3}]
    assert "The JSON has 3 lists and objects, the limit is 2." in rejected(b'[[1,2],{"a":3}]', max_containers=2).detail


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b'"\xff"', '{"a": "ü"}'.encode("utf-16"), '{"a": 1}'.encode("utf-32"), b"[" * 990, b"9" * 5_000,
        b'"\\u0000"', b'{"\\u0000": 1}', b'["a", {"b": ["\\ud800"]}]', b'"\\udfff\\ud83d"', b'"\xed\xa0\x80"', b'"\0"',
    ],
)  # fmt: skip
def test_invalid_json_and_text_that_cannot_be_stored_are_rejected(body: bytes) -> None:
    assert rejected(body).code == "bad_json"


def test_valid_json_is_parsed() -> None:
    for text, value in (("\ufeff{}", {}), ('"\\ud83d\\udc08"', "🐈"), ('"🐈\\n\\\\u0000"', "🐈\n\\u0000"), ("NaN", None)):
        parsed = parse_json(text.encode(), max_values=1_000, hint="")
        assert parsed == value or value is None


@pytest.mark.usefixtures("no_parser")
@pytest.mark.parametrize("item", [b"[]", b"{}", b"1", b'{"name":"label"}'])
def test_no_route_parses_a_million_values(app: Flask, infer: str, item: bytes) -> None:
    for path in ("/predict", infer, "/admin/bundle", "/gallery/review"):
        before = services_of(app).model_manager.metrics.errors.labels("json_too_large")._value.get()
        items = b",".join([item] * (1_000_000 if path in ("/predict", infer) else 3_000))
        response = post(app, path, b'{"instances":[' + items + b"]}")
        assert response.status_code == 413, path
        assert services_of(app).model_manager.metrics.errors.labels("json_too_large")._value.get() == before + 1


@pytest.mark.usefixtures("no_parser")
def test_admin_rejects_a_large_body(app: Flask) -> None:
    response = post(app, "/admin/bundle", {"bundle": "x" * 100_000})
    assert (response.status_code, response.get_json()["code"]) == (413, "body_too_large")


def test_the_max_number_of_images_fits_in_every_form(app: Flask, infer: str, tiny_bundle: SimpleNamespace) -> None:
    photo = base64.b64encode((tiny_bundle.photos / "red" / "red.000.jpg").read_bytes()).decode()
    others = {"file": "a.jpg", "tags": ["red"] * 5, "size": {"width": 1, "height": 1}}
    response = post(app, "/predict", {"instances": [others | {"b64": photo}] * MAX_PHOTOS, "other": list(range(900))})
    assert [row["label"] for row in response.get_json()["predictions"]] == ["red"] * MAX_PHOTOS
    seen = services_of(app).model_manager.get().bundle.preprocessing
    pixels = np.zeros((MAX_PHOTOS, seen.input_px, seen.input_px, seen.channels), np.uint8)
    for data in (pixels.tolist(), pixels.ravel().tolist()):
        tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape), "data": data}
        assert len(post(app, infer, {"inputs": [tensor]}).get_json()["outputs"][1]["data"]) == MAX_PHOTOS
    more = np.zeros((MAX_PHOTOS + 1, *pixels.shape[1:]), np.uint8)
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(more.shape), "data": more.tolist()}
    assert post(app, infer, {"inputs": [tensor]}).status_code == 413


DEEP: Any = []
for _ in range(900):
    DEEP = [DEEP]
ODD = [None, True, 5, -1, 1e308, float("nan"), "", "text", [], {}, [[]], [{}], {"a": []}, [None], DEEP]


def everywhere(document: Any) -> Iterator[Any]:
    """Yield the document with each of its values replaced by each value of ODD."""

    def paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        yield path
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            yield from paths(inner, (*path, key))

    for path in paths(document, ()):
        for odd in ODD:
            changed = {"document": copy.deepcopy(document)}
            place: Any = changed
            steps = ("document", *path)
            for step in steps[:-1]:
                place = place[step]
            place[steps[-1]] = odd
            yield changed["document"]


def test_a_value_of_another_type_anywhere_is_no_server_error(app: Flask, infer: str) -> None:
    fields = ("photo", "sha256", "model", "decision", "new_label", "note", "reviewer", "expected_version")
    decision = dict.fromkeys(fields, "note")
    tensor = {"name": "images", "datatype": "BYTES", "shape": [1], "data": ["eA=="], "parameters": {"binary_data_size": 1}}
    pixels = {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
    outputs = [{"name": "probabilities", "parameters": {"classification": 1, "binary_data": True}}]
    rest = {"id": "a", "parameters": {"binary_data_output": True}, "outputs": outputs}
    documents: list[tuple[str, Any]] = [
        ("/predict", {"image": "eA=="}),
        ("/predict", {"instances": [{"b64": "eA=="}]}),
        ("/admin/bundle", {"bundle": "x", "allow": ["classes"]}),
        ("/gallery/review", decision | {"filter": "class=red", "next": "1"}),
        (infer, {"inputs": [tensor], **rest}),
        (infer, {"inputs": [pixels], **rest}),
    ]
    for path, document in documents:
        for changed in everywhere(document):
            response = post(app, path, changed)
            assert response.status_code < 500, f"{path}: {json.dumps(changed)[:300]} -> {response.text[:300]}"
            assert len(response.data) < 3_000

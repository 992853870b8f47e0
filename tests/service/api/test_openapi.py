"""/openapi.json says what is true, /docs shows all of it, and the service keeps to it under whatever is sent."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import schemathesis
from flask import Flask
from hypothesis import strategies as st
from schemathesis.checks import CHECKS
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.schemas import OpenApiSchema

from service import create_app
from service.api.openapi import document
from service.context import services_of
from service.http.errors import PROBLEM_TYPES
from service.settings import Settings
from tests.helpers.server import ANSWER_S, PATIENT, START_S, poll, serve


@pytest.fixture(scope="module")
def app(tiny_bundle: SimpleNamespace) -> Iterator[Flask]:
    app = create_app(Settings(bundle=tiny_bundle.path, max_images=4, max_body_mb=1, **PATIENT))
    services_of(app).model_manager.wait(START_S)
    poll(lambda: app.test_client().get("/gallery").status_code == 200)
    yield app
    services_of(app).model_manager.close()


@pytest.fixture(scope="module")
def said(app: Flask) -> dict[str, Any]:
    return dict(app.test_client().get("/openapi.json").get_json())


@pytest.fixture(scope="module")
def api(app: Flask, tiny_bundle: SimpleNamespace) -> OpenApiSchema:
    """What schemathesis makes of the document; of the photos that it sends as they are, half can be read."""
    photo = (tiny_bundle.photos / "red" / "red.000.jpg").read_bytes()
    schemathesis.openapi.media_type("image/*", st.one_of(st.just(photo), st.binary()), aliases=["application/octet-stream"])
    refusals = {"negative_data_rejection": {"expected-statuses": ["400", "403", "404", "405", "413", "415", "422"]}}
    config = SchemathesisConfig.from_dict({"checks": refusals})
    return schemathesis.openapi.from_wsgi("/openapi.json", app, config=config)


def operations(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, row in document["paths"].items() for method in row}


def test_every_route_is_in_the_document_and_the_other_way_round(app: Flask, said: dict[str, Any]) -> None:
    routes = {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        if rule.rule != "/favicon.ico"  # a redirect for browsers
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert operations(said) == routes


def test_the_document_is_openapi_3_1_without_loose_ends(api: OpenApiSchema, said: dict[str, Any]) -> None:
    api.validate()
    assert said["openapi"].startswith("3.1")
    names = set(re.findall(r"'#/components/(\w+)/([\w-]+)'", str(said)))
    assert names
    assert all(name in said["components"][kind] for kind, name in names)
    ids = [row["operationId"] for path in said["paths"].values() for row in path.values()]
    assert len(set(ids)) == len(ids)


def test_every_problem_is_documented_under_its_status(said: dict[str, Any]) -> None:
    answers = [answer for path in said["paths"].values() for row in path.values() for answer in row["responses"].items()]
    answers += [("404", said["components"]["responses"]["NotFound"])]
    answers += [("405", said["components"]["responses"]["MethodNotAllowed"])]
    found = {(code, int(status)) for status, row in answers for code in re.findall(r"`(\w+)`", row.get("description", ""))}
    assert {(code, problem.status) for code, problem in PROBLEM_TYPES.items()} == {
        (code, status) for code, status in found if status >= 400
    }


def test_a_problem_s_type_leads_to_its_row_in_the_docs(app: Flask) -> None:
    docs = app.test_client().get("/docs").text
    for code, (status, title, _) in PROBLEM_TYPES.items():
        row = re.search(rf'<div id="{code}">.*?</div>', docs, re.DOTALL)
        assert row
        assert all(words in row[0] for words in (str(status), title))
    problem = app.test_client().post("/predict", data=b"", content_type="image/png").get_json()
    assert f'id="{problem["type"].removeprefix("/docs#")}"' in docs


def test_the_docs_show_every_operation_parameter_and_form(app: Flask, said: dict[str, Any]) -> None:
    docs = app.test_client().get("/docs").text.replace("<wbr>", "")
    for method, path in operations(said):
        assert re.search(rf">{method}</span> <code>{re.escape(path)}</code>", docs)
    predict = said["paths"]["/predict"]["post"]
    for name in [row["name"] for row in predict["parameters"]] + list(predict["requestBody"]["content"]):
        assert f"<code>{name}</code>" in docs
    assert "/gallery/<wbr>photos.json</code>" in app.test_client().get("/docs").text
    identifiers = re.findall(r' id="([^"]+)"', docs)
    assert len(set(identifiers)) == len(identifiers)
    assert set(re.findall(r'href="#([^"]+)"', docs)) <= set(identifiers)


def test_a_key_is_wanted_by_the_document_where_it_is_by_the_service(tiny_bundle: SimpleNamespace, said: dict[str, Any]) -> None:
    app = create_app(Settings(bundle=tiny_bundle.path, api_keys=("ann:sesame",)))
    services_of(app).model_manager.wait(START_S)
    keyed = app.test_client().get("/openapi.json").get_json()["paths"]["/predict"]["post"]
    services_of(app).model_manager.close()
    assert keyed["security"] == [{"bearer": []}, {"apiKey": []}]
    assert all("KEY" in sample["source"] for sample in keyed["x-codeSamples"])
    assert {} in said["paths"]["/predict"]["post"]["security"]


def test_each_form_of_the_document_is_taken(app: Flask, said: dict[str, Any], tiny_bundle: SimpleNamespace) -> None:
    photo = (tiny_bundle.photos / "red" / "red.000.jpg").read_bytes()
    text = base64.b64encode(photo).decode()
    sent: dict[str, list[dict[str, Any]]] = {
        "multipart/form-data": [{"data": {"file": (io.BytesIO(photo), "a.jpg")}}],
        "image/*": [{"data": photo, "content_type": "image/jpeg"}],
        "application/octet-stream": [{"data": photo, "content_type": "application/octet-stream"}],
        "application/json": [{"json": {"image": text}}, {"json": {"instances": [{"b64": text}]}}],
    }
    assert set(sent) == set(said["paths"]["/predict"]["post"]["requestBody"]["content"])
    labels = {
        app.test_client().post("/predict", **options).get_json()["predictions"][0]["label"]
        for ways in sent.values()
        for options in ways
    }
    assert labels == {"red"}


def test_the_examples_run_as_they_stand(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("photo.jpg", "cat.jpg", "dog.jpg"):
        (tmp_path / name).write_bytes((tiny_bundle.photos / "red" / "red.000.jpg").read_bytes())
    with serve(tiny_bundle.path) as server:
        samples = server.get("/openapi.json").json()["paths"]["/predict"]["post"]["x-codeSamples"]
        source = {sample["lang"]: sample["source"] for sample in samples}
        for command in ([sys.executable, "-c", source["python"]], ["sh", "-ec", source["shell"]]):
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=ANSWER_S)
            assert done.returncode == 0, done.stderr
            assert "red" in done.stdout


# Whatever is sent: no answer that the document does not have, and no error of the server's own

PATHS = document(Settings(), "http://localhost")["paths"]
WAYS = [
    (method.upper(), path, mode)
    for path, row in PATHS.items()
    for method, operation in row.items()
    for mode in GenerationMode
    if mode.is_positive or "requestBody" in operation or "query" in str(operation.get("parameters"))
]
PROMISES = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "negative_data_rejection",
]
BOUNDED = hypothesis.settings(
    max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)


@pytest.mark.parametrize(("method", "path", "mode"), WAYS)
def test_the_service_keeps_to_its_document(api: OpenApiSchema, method: str, path: str, mode: GenerationMode) -> None:
    @BOUNDED
    @hypothesis.given(case=api[path][method].as_strategy(generation_mode=mode))
    def keeps(case: schemathesis.Case) -> None:
        # Schemathesis accepts gzip, but does not decompress responses of a WSGI application.
        case.call_and_validate(checks=CHECKS.get_by_names(PROMISES), headers={"Accept-Encoding": "identity"})

    keeps()

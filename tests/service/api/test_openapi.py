"""The OpenAPI document agrees with the application, /docs shows all of it, and the service conforms to it."""

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
from service.api.openapi import DOCUMENT, PLACEHOLDER, load_document, operations
from service.context import services_of
from service.db.filter import CHANGES, FLAGS, OTHER_PARAMETERS, OUTCOMES, PAGE_SIZES, PARAMETERS, REVIEWS, SORT_ORDERS, SOURCES
from service.gallery import review
from service.http.errors import PROBLEM_TYPES
from service.rollout.agreement import ALLOWED_DIFFERENCES
from service.settings import Settings
from service.web import api_docs
from tests.helpers.server import LONG_TIMEOUTS, RESPONSE_TIMEOUT_S, START_TIMEOUT_S, poll, serve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def app(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flask]:
    studio: dict[str, Any] = {"studio": True, "studio_dir": tmp_path_factory.mktemp("studio"), "studio_min_free_mb": 0}
    app = create_app(Settings(bundle=tiny_bundle.path, max_images=4, max_body_mb=1, **studio, **LONG_TIMEOUTS))
    services_of(app).model_manager.wait(START_TIMEOUT_S)
    poll(lambda: app.test_client().get("/gallery").status_code == 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.studio.finetune_process.is_installed", lambda: False)  # generated requests start no commands
        yield app
    services_of(app).model_manager.close()


@pytest.fixture(scope="module")
def document(app: Flask) -> dict[str, Any]:
    return dict(app.test_client().get("/openapi.json").get_json())


@pytest.fixture(scope="module")
def api(app: Flask, tiny_bundle: SimpleNamespace) -> OpenApiSchema:
    """The document for schemathesis. Half of the images that it generates can be decoded."""
    photo = (tiny_bundle.photos / "red" / "red.000.jpg").read_bytes()
    schemathesis.openapi.media_type("image/*", st.one_of(st.just(photo), st.binary()), aliases=["application/octet-stream"])
    refusals = {"negative_data_rejection": {"expected-statuses": ["400", "403", "404", "405", "413", "415", "422"]}}
    config = SchemathesisConfig.from_dict({"checks": refusals})
    return schemathesis.openapi.from_wsgi("/openapi.json", app, config=config)


def test_the_document_describes_exactly_the_routes_of_the_application(app: Flask, document: dict[str, Any]) -> None:
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method)
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert {(path, method) for path, method, _ in operations(document)} == routes


def test_the_document_is_valid_openapi_3_1(api: OpenApiSchema, document: dict[str, Any]) -> None:
    api.validate()
    assert document["openapi"].startswith("3.1")
    references = set(re.findall(r"'#/components/(\w+)/([\w-]+)'", str(document)))
    assert references
    assert references <= {(kind, name) for kind, entries in document["components"].items() for name in entries}
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)


def test_every_component_is_used(document: dict[str, Any]) -> None:
    used = set(re.findall(r"'#/components/(\w+)/([\w-]+)'", str(document)))
    defined = {(kind, name) for kind, entries in document["components"].items() for name in entries}
    assert defined - used == {
        ("securitySchemes", "bearer"),
        ("securitySchemes", "apiKey"),
        ("responses", "MethodNotAllowed"),  # of every path, for a method that it does not list
        ("responses", "AddressTooLong"),  # of every path, as is the next one
        ("responses", "HeadersTooLarge"),
    }


def test_the_error_codes_are_those_of_the_service(document: dict[str, Any]) -> None:
    for name in ("Problem", "ImageProblem"):
        fields = document["components"]["schemas"][name]["properties"]
        assert fields["code"]["enum"] == list(PROBLEM_TYPES)
        assert fields["status"]["enum"] == sorted({problem.status for problem in PROBLEM_TYPES.values()})


def test_every_error_code_is_documented_under_its_status(document: dict[str, Any]) -> None:
    responses = [item for _, _, operation in operations(document) for item in operation["responses"].items()]
    shared = document["components"]["responses"]
    responses += [("404", shared["NotFound"]), ("405", shared["MethodNotAllowed"])]
    responses += [("414", shared["AddressTooLong"]), ("431", shared["HeadersTooLarge"])]
    documented = {
        (code, int(status))
        for status, response in responses
        for code in re.findall(r"`(\w+)`", response.get("description", ""))
        if status >= "400"
    }
    assert documented == {(code, problem.status) for code, problem in PROBLEM_TYPES.items()}


def test_the_parameters_of_a_listing_are_those_of_the_gallery(document: dict[str, Any]) -> None:
    references = document["paths"]["/gallery/photos.json"]["get"]["parameters"]
    shared = [document["components"]["parameters"][row["$ref"].rpartition("/")[2]] for row in references]
    schemas = {row["name"]: row["schema"] for row in shared}
    assert list(schemas) == ["model", *PARAMETERS, *OTHER_PARAMETERS]
    values = {"outcome": OUTCOMES, "source": SOURCES, "review": REVIEWS, "flag": FLAGS}
    for name in PARAMETERS:
        assert schemas[name] == {"type": "array", "items": {"type": "string"} | _enum(values.get(name))}
    assert schemas["change"] == {"type": "string"} | _enum(CHANGES)
    assert schemas["sort"] == {"type": "string"} | _enum(tuple(SORT_ORDERS))
    per_page = schemas["per_page"]["oneOf"][0]
    assert (per_page["minimum"], per_page["maximum"]) == (PAGE_SIZES[0], PAGE_SIZES[-1])


def _enum(values: tuple[str, ...] | None) -> dict[str, list[str]]:
    return {"enum": [*values, ""]} if values else {}


def test_the_fields_of_a_review_are_those_of_the_gallery(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["ReviewRequest"]["properties"]
    assert set(fields) == set(review.FIELDS)
    assert {name: field["maxLength"] for name, field in fields.items() if "maxLength" in field} == review.MAX_LENGTHS


def test_the_differences_that_a_rollout_may_allow_are_listed(document: dict[str, Any]) -> None:
    body = document["paths"]["/admin/bundle"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["allow"]["items"]["enum"] == list(ALLOWED_DIFFERENCES)


def test_the_rows_of_a_listing_have_the_documented_fields(app: Flask, document: dict[str, Any]) -> None:
    rows = app.test_client().get("/gallery/photos.json").get_json()["rows"]
    assert rows
    for row in rows:
        assert list(row) == list(document["components"]["schemas"]["PhotoRecord"]["properties"])


def test_every_placeholder_is_filled_from_the_settings() -> None:
    names = set(PLACEHOLDER.findall(re.sub(r"(?m)^#.*", "", DOCUMENT.read_text(encoding="utf-8"))))
    settings = Settings(max_images=7, max_body_mb=3.5, max_megapixels=12, min_agreement=0.85, shadow_samples=9)
    text = str(load_document(settings))
    assert {"MAX_IMAGES", "MAX_BODY_MB", "IMAGE_FORMATS"} <= names
    assert not [name for name in names if f"<{name}>" in text]
    assert "'maxItems': 7" in text
    assert "7 images and 3.5 MiB per request, 12 megapixels per image" in text
    assert "the same label to 85% of the last 9 classified images" in re.sub(r"\\n *", " ", text)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"shadow_samples": 0}, "Images are not stored."),
        ({"shadow_samples": 0, "save_predictions": True}, "Images are stored for up to 30 days for review."),
        (
            {"shadow_samples": 5},
            "Images are not stored. The network's inputs of the last 5 stay in memory, to compare the next bundle.",
        ),
    ],
)
def test_the_description_states_whether_images_are_stored(options: dict[str, Any], note: str) -> None:
    description = load_document(Settings(**options))["paths"]["/predict"]["post"]["description"]
    assert description.rstrip().endswith(f"\n\n{note}")


def test_the_example_of_an_error_has_the_title_of_its_code(document: dict[str, Any]) -> None:
    example = document["paths"]["/predict"]["post"]["responses"]["200"]["content"]["application/json"]["example"]
    error = example["predictions"][-1]["error"]
    assert (error["status"], error["title"]) == PROBLEM_TYPES[error["code"]][:2]


def test_the_document_is_serialized_once_and_revalidated_by_etag(app: Flask) -> None:
    client = app.test_client()
    first = client.get("/openapi.json")
    misses = api_docs._serialize.cache_info().misses
    again = client.get("/openapi.json", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert client.get("/openapi.json").data == first.data
    assert api_docs._serialize.cache_info().misses == misses
    assert client.head("/openapi.json").headers["Content-Length"] == str(len(first.data))


def test_the_server_of_the_document_is_the_one_that_the_client_used(app: Flask) -> None:
    client = app.test_client()
    local = client.get("/openapi.json")
    other = client.get("/openapi.json", base_url="https://localhost:8443/")
    assert local.get_json()["servers"] == [{"url": "http://localhost"}]
    assert other.get_json()["servers"] == [{"url": "https://localhost:8443"}]
    assert "localhost:8000" not in local.text + other.text
    assert local.headers["ETag"] != other.headers["ETag"]


# The page


def test_the_type_of_an_error_links_to_its_row_on_the_page(app: Flask) -> None:
    page = app.test_client().get("/docs").text
    for code, (status, title, _) in PROBLEM_TYPES.items():
        row = re.search(rf'<div id="{code}">.*?</div>', page, re.DOTALL)
        assert row
        assert all(words in row[0] for words in (str(status), title))
    problem = app.test_client().post("/predict", data=b"", content_type="image/png").get_json()
    assert f'id="{problem["type"].removeprefix("/docs#")}"' in page


def test_the_page_shows_every_operation_parameter_and_body(app: Flask, document: dict[str, Any]) -> None:
    original = app.test_client().get("/docs").text
    assert "/gallery/<wbr>photos.json</code>" in original
    page = original.replace("<wbr>", "")
    for path, method, operation in operations(document):
        assert re.search(rf">{method}</span> <code>{re.escape(path)}</code>", page)
        assert f'id="{operation["operationId"]}"' in page
    predict = document["paths"]["/predict"]["post"]
    for name in [row["name"] for row in predict["parameters"]] + list(predict["requestBody"]["content"]):
        assert f"<code>{name}</code>" in page
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(set(identifiers)) == len(identifiers)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(identifiers)


def test_the_page_describes_a_shared_parameter_once(app: Flask, document: dict[str, Any]) -> None:
    page = app.test_client().get("/docs").text
    for name, parameter in document["components"]["parameters"].items():
        assert page.count(f'<div id="parameter-{name}">') == 1
        assert page.count(f'<a href="#parameter-{name}"><code>{parameter["name"]}</code></a>') >= 1
    assert page.count("The difference from the model <code>baseline</code>") == 1


def test_every_operation_on_the_page_but_a_form_has_an_example(app: Flask, document: dict[str, Any]) -> None:
    page = app.test_client().get("/docs").text
    for path, method, operation in operations(document):
        entry = re.search(rf'<details class="operation" id="{operation["operationId"]}".*?</details>', page, re.DOTALL)
        assert entry
        has_example = operation["operationId"] not in ("oipInferVersion", "gallery_key")
        assert ('class="sample"' in entry[0]) == has_example, path
        can_open = method == "GET" and "{" not in path
        assert (f'<a href="{path}">Open ' in entry[0]) == can_open


def test_an_api_key_is_documented_if_the_service_requires_one(tiny_bundle: SimpleNamespace, document: dict[str, Any]) -> None:
    app = create_app(Settings(bundle=tiny_bundle.path, api_keys=("ann:sesame",)))
    services_of(app).model_manager.wait(START_TIMEOUT_S)
    keyed = app.test_client().get("/openapi.json").get_json()["paths"]["/predict"]["post"]
    page = app.test_client().get("/docs").text
    services_of(app).model_manager.close()
    assert keyed["security"] == [{"bearer": []}, {"apiKey": []}]
    assert all("KEY" in sample["source"] for sample in keyed["x-codeSamples"])
    assert "This service requires an API key:" in page
    assert {} in document["paths"]["/predict"]["post"]["security"]


# The examples


def test_every_documented_body_is_accepted(app: Flask, document: dict[str, Any], tiny_bundle: SimpleNamespace) -> None:
    photo = (tiny_bundle.photos / "red" / "red.000.jpg").read_bytes()
    text = base64.b64encode(photo).decode()
    sent: dict[str, list[dict[str, Any]]] = {
        "multipart/form-data": [{"data": {"file": (io.BytesIO(photo), "a.jpg")}}],
        "image/*": [{"data": photo, "content_type": "image/jpeg"}],
        "application/octet-stream": [{"data": photo, "content_type": "application/octet-stream"}],
        "application/json": [{"json": {"image": text}}, {"json": {"instances": [{"b64": text}]}}],
    }
    assert set(sent) == set(document["paths"]["/predict"]["post"]["requestBody"]["content"])
    labels = {
        app.test_client().post("/predict", **options).get_json()["predictions"][0]["label"]
        for ways in sent.values()
        for options in ways
    }
    assert labels == {"red"}


def test_the_examples_run_unchanged(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("photo.jpg", "cat.jpg", "dog.jpg"):
        (tmp_path / name).write_bytes((tiny_bundle.photos / "red" / "red.000.jpg").read_bytes())
    with serve(tiny_bundle.path) as server:
        samples = server.get("/openapi.json").json()["paths"]["/predict"]["post"]["x-codeSamples"]
        source = {sample["lang"]: sample["source"] for sample in samples}
        for command in ([sys.executable, "-c", source["python"]], ["sh", "-ec", source["shell"]]):
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=RESPONSE_TIMEOUT_S)
            assert done.returncode == 0, done.stderr
            assert "red" in done.stdout


# Conformance: no undocumented response to generated requests, and no server error


def takes_input(operation: dict[str, Any]) -> bool:
    """Whether an operation has a body or query parameters, so that it can be sent invalid ones."""
    shared = load_document(Settings())["components"]["parameters"]
    rows = [shared[row["$ref"].rpartition("/")[2]] if "$ref" in row else row for row in operation.get("parameters", [])]
    kinds = set(operation.get("requestBody", {}).get("content", ())) - {"application/octet-stream"}  # any bytes are valid
    return bool(kinds) or any(row["in"] == "query" for row in rows)


CASES = [
    (method, path, mode)
    for path, method, operation in operations(load_document(Settings(studio=True)))
    for mode in GenerationMode
    if mode.is_positive or takes_input(operation)
]
CONFORMANCE = [
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


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_the_service_conforms_to_the_document(api: OpenApiSchema, method: str, path: str, mode: GenerationMode) -> None:
    @BOUNDED
    @hypothesis.given(case=api[path][method].as_strategy(generation_mode=mode))
    def conforms(case: schemathesis.Case) -> None:
        if case.media_type == "application/x-www-form-urlencoded" and isinstance(case.body, dict):
            hypothesis.assume(not any(isinstance(value, list) for value in case.body.values()))  # sent without these fields
        # Few forms are invalid: each field is text, any field may be a file, and an empty file without a name does not count.
        skipped = {"negative_data_rejection"} if case.media_type == "multipart/form-data" else set()
        checks = CHECKS.get_by_names([name for name in CONFORMANCE if name not in skipped])
        # Schemathesis does not decompress the response of a WSGI application.
        case.call_and_validate(checks=checks, headers={"Accept-Encoding": "identity"})

    conforms()

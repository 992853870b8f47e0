"""Load openapi.yaml and fill in the values of the settings and the error responses."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml

from models.preprocess import IMAGE_FORMATS_TEXT
from service.http.errors import PROBLEM_MEDIA_TYPE, PROBLEM_TYPES
from service.settings import Settings

DOCUMENT = Path(__file__).with_name("openapi.yaml")
EXAMPLE_URL = "http://localhost:8000"  # stands for the address of the server
PLACEHOLDER = re.compile(r"<([A-Z0-9_]+)>")
PROBLEM_HEADERS = {401: ["WWW-Authenticate"], 405: ["Allow"], 503: ["Retry-After"]}
HTML = {"text/html": {"schema": {"type": "string"}}}
PROTOCOL_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/OipError"}}}


@functools.lru_cache(maxsize=1)
def load_document(settings: Settings) -> dict[str, Any]:
    """Return the OpenAPI document for these settings, with EXAMPLE_URL as the server. The result must not be modified."""
    with DOCUMENT.open(encoding="utf-8") as file:
        document = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    document = {name: value for name, value in document.items() if not name.startswith("x-")}
    if not settings.studio:
        document["paths"] = {path: item for path, item in document["paths"].items() if not path.startswith("/studio")}
        document["tags"] = [tag for tag in document["tags"] if tag["name"] != "Studio"]
    document = _fill(document, _values(settings))
    for path, method, operation in operations(document):
        if "parameters" in operation:
            operation["parameters"] = list(_flat(operation["parameters"]))
        keys = settings.api_keys or (settings.admin_keys if "Studio" in operation["tags"] else ())
        if keys and {} in operation.get("security", []):
            operation["security"] = [scheme for scheme in operation["security"] if scheme]
        if method == "GET":
            operation["x-codeSamples"] = operation.get("x-codeSamples") or [_curl(path)]
        operation["responses"] |= _problem_responses(
            list(_flat(operation.pop("x-problems", []))), operation.pop("x-problems-as", "json")
        )
    shared = document["components"]["responses"]
    for name, response in shared.items():
        (shared[name],) = _problem_responses(response["x-problems"], "json").values()
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the path, the method in upper case and the description of each operation."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def _curl(path: str) -> dict[str, str]:
    return {"lang": "shell", "label": "curl", "source": f"curl '{EXAMPLE_URL}{path}'\n"}


def _values(settings: Settings) -> dict[str, Any]:
    """Return the value of each placeholder."""
    needs_key = bool(settings.api_keys)
    storage = "Images are not stored."
    if settings.save_predictions:
        storage = f"Images are stored for up to {settings.retention_days:g} days for review."
    if settings.shadow_samples:
        storage += f" The network's inputs of the last {settings.shadow_samples} stay in memory, to compare the next bundle."
    return {field.name.upper(): getattr(settings, field.name) for field in dataclasses.fields(settings)} | {
        "API_KEY_NOTE": "An API key is required." if needs_key else "No API key is required.",
        "BUNDLE_ROOT": settings.resolved_bundle_root.name,
        "CURL_KEY": " -H 'Authorization: Bearer KEY'" if needs_key else "",
        "FORM_KEY": " -F key=KEY" if needs_key else "",
        "IMAGE_FORMATS": IMAGE_FORMATS_TEXT,
        "JAVASCRIPT_KEY": ', headers: { Authorization: "Bearer KEY" }' if needs_key else "",
        "MIN_AGREEMENT": f"{settings.min_agreement:.0%}",
        "PYTHON_KEY": ', "Authorization": "Bearer KEY"' if needs_key else "",
        "STORAGE_NOTE": storage,
    }


def _fill(node: Any, values: dict[str, Any]) -> Any:
    """Copy a tree with its placeholders replaced. A text that is nothing but a placeholder gets the type of its value."""
    if isinstance(node, dict):
        return {name: _fill(value, values) for name, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, values) for value in node]
    if not isinstance(node, str):
        return node
    if alone := PLACEHOLDER.fullmatch(node):
        return values[alone[1]]
    return PLACEHOLDER.sub(lambda found: _text(values[found[1]]), node)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(rows: list[Any]) -> Iterator[Any]:
    for row in rows:
        if isinstance(row, list):
            yield from _flat(row)
        else:
            yield row


def _problem_responses(codes: list[str], form: str) -> dict[str, Any]:
    """Group error codes by status, and describe the response of each status."""
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(PROBLEM_TYPES[code].status, []).append(code)
    return {str(status): _problem_response(status, by_status[status], form) for status in sorted(by_status)}


def _problem_response(status: int, codes: list[str], form: str) -> dict[str, Any]:
    headers = ["X-Request-ID", *PROBLEM_HEADERS.get(status, [])]
    only = {"properties": {"code": {"enum": codes}, "status": {"const": status}}}
    problem = {PROBLEM_MEDIA_TYPE: {"schema": {"allOf": [{"$ref": "#/components/schemas/Problem"}, only]}}}
    return {
        "description": f"{HTTPStatus(status).phrase}: {', '.join(f'`{code}`' for code in codes)}.",
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in headers},
        "content": {"json": problem, "page": HTML, "form": problem | HTML, "protocol": PROTOCOL_ERROR}[form],
    }

"""The API description: /openapi.json for programs, and /docs for people."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from flask import Blueprint, Response, render_template, request
from markupsafe import Markup, escape

from service.api.openapi import EXAMPLE_URL, load_document, operations
from service.context import services
from service.http.errors import PROBLEM_TYPES
from service.settings import Settings
from service.web.layout import render_markdown

bp = Blueprint("docs", __name__)


@bp.get("/openapi.json")
def openapi() -> Response:
    url = json.dumps(_server_url())[1:-1].encode()
    body = _serialize(services().settings).replace(EXAMPLE_URL.encode(), url)
    return Response(body, headers={"Cache-Control": "no-cache"}, mimetype="application/json")


@bp.get("/docs")
def docs() -> Response:
    document = load_document(services().settings)
    text = render_template(
        "docs.html",
        document=document,
        groups=_group(document),
        problems=PROBLEM_TYPES,
        resolve=functools.partial(_resolve, document),
        with_url=lambda source: source.replace(EXAMPLE_URL, _server_url()),
    )
    return Response(text, headers={"Cache-Control": "no-cache"}, mimetype="text/html")


@bp.app_template_filter("markdown")
def markdown(text: str) -> Markup:
    """Render Markdown. A path in code may break after a slash, and nowhere else."""
    return Markup(re.sub(r"(?<=<code>)[^<]+", lambda code: _breakable(code[0]), render_markdown(text)))


@bp.app_template_filter("break_slashes")
def break_slashes(text: str) -> Markup:
    """Allow line breaks after the slashes of a path or a media type."""
    return Markup(_breakable(str(escape(text))))


@bp.app_template_filter("pretty_json")
def pretty_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


@functools.lru_cache(maxsize=1)
def _serialize(settings: Settings) -> bytes:
    return json.dumps(load_document(settings)).encode()


def _server_url() -> str:
    return request.url_root.rstrip("/")


def _group(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tags of the document, each with its operations."""
    rows = [{"path": path, "method": method, **operation} for path, method, operation in operations(document)]
    return [
        tag | {"id": _slug(tag["name"]), "operations": [row for row in rows if tag["name"] in row["tags"]]}
        for tag in document["tags"]
    ]


def _resolve(document: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow a ``$ref`` to a component."""
    if "$ref" in node:
        _, _, kind, name = node["$ref"].split("/")
        resolved: dict[str, Any] = document["components"][kind][name]
        return resolved
    return node


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _breakable(html: str) -> str:
    return re.sub(r"(?<=[^/])/(?=[^/])", "/<wbr>", html)

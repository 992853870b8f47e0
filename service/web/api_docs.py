"""GET /openapi.json, and GET /docs: the same document as a page to be read."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from flask import Blueprint, Response, render_template, request
from markupsafe import Markup, escape

from service.api.openapi import document
from service.context import services
from service.http.errors import PROBLEM_TYPES
from service.settings import Settings
from service.web.layout import render_markdown

bp = Blueprint("docs", __name__)


@bp.get("/openapi.json")
def openapi() -> Response:
    text = _openapi_json(services().settings, request.url_root.rstrip("/"))
    return Response(text, headers={"Cache-Control": "no-cache"}, mimetype="application/json")


@functools.lru_cache(maxsize=8)
def _openapi_json(settings: Settings, url: str) -> str:
    """Render the document once for each address of the server: it takes 10 ms of the interpreter's lock."""
    return json.dumps(document(settings, url), indent=1)


@bp.get("/docs")
def docs() -> Response:
    described = _document()
    text = render_template("docs.html", document=described, groups=_groups(described), codes=PROBLEM_TYPES)
    return Response(text, headers={"Cache-Control": "no-cache"}, mimetype="text/html")


@bp.app_template_filter("markdown")
def markdown(text: str) -> Markup:
    """With paths in code that go on in the next line behind a slash, and nowhere else."""
    return Markup(re.sub(r"(?<=<code>)[^<]+", lambda code: _slashed(code[0]), render_markdown(text)))


@bp.app_template_filter("break_slashes")
def break_slashes(text: str) -> Markup:
    """A path or a media type that may go on in the next line behind a slash."""
    return Markup(_slashed(str(escape(text))))


def _slashed(html: str) -> str:
    return re.sub(r"(?<=[^/])/(?=[^/])", "/<wbr>", html)


@bp.app_template_filter("pretty_json")
def pretty_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _document() -> dict[str, Any]:
    settings = services().settings
    return document(settings, request.url_root.rstrip("/"))


def _groups(described: dict[str, Any]) -> list[dict[str, Any]]:
    """The document's tags, each with its operations."""
    rows = [
        {"method": method.upper(), "path": path, **operation}
        for path, operations in described["paths"].items()
        for method, operation in operations.items()
    ]
    return [tag | {"operations": [row for row in rows if tag["name"] in row["tags"]]} for tag in described["tags"]]

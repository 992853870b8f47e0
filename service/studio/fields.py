"""What the studio's endpoints share that serve browsers and programs: fields of a form or of JSON, and JSON responses."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from flask import Response, jsonify, request
from werkzeug.datastructures import MultiDict

from service.context import services
from service.http.errors import Problem
from service.http.request_body import parse_json, read_body
from service.http.text_validation import check_items, describe

MAX_BODY_BYTES = 4 << 20
MAX_VALUES = 50_000
FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data")


def wants_page() -> bool:
    """Return whether to answer with a page, not JSON: a browser sends forms and accepts HTML."""
    return not request.is_json and request.accept_mimetypes.best_match(("application/json", "text/html")) == "text/html"


def uncached_json(*args: Any, **kwargs: Any) -> Response:
    """Build a JSON response that is not cached. The arguments are those of ``flask.jsonify``."""
    response = jsonify(*args, **kwargs)
    response.headers["Cache-Control"] = "no-store"
    return response


def read_fields(names: Mapping[str, type], *, max_body_bytes: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """Read the fields of a request.

    Args:
        names: The type of each field: ``str``, or ``list`` for a list of texts, which a form sends as repeated fields.
        max_body_bytes: Size limit of the body.

    Returns:
        The value of each field; "" or an empty list for one that is missing.

    Raises:
        Problem: The body cannot be read, or has an unknown field or a wrong type.
    """
    body = read_body(request, services().settings, max_bytes=max_body_bytes, advice="Send fewer names at a time.")
    if request.is_json:
        values = _from_json(body, names)
    elif body and request.mimetype not in FORM_TYPES:
        what = request.mimetype[:80] or "none"
        raise Problem("unsupported_media_type", f"Unsupported Content-Type: {what}. Send a form or JSON.")
    else:
        request.environ["wsgi.input"] = io.BytesIO(body)  # Flask would wait for a slow client
        values = MultiDict(request.form)
        if body and not values:  # Werkzeug returns an empty form for one that it cannot parse
            raise Problem("bad_request", "The form cannot be read. Let a browser or an HTTP library encode it.")
    if unknown := set(values) - set(names):
        raise Problem("bad_parameter", f"Unknown field {min(unknown)!r}. Valid fields: {', '.join(names)}.")
    check_items("field", values.items(multi=True))
    return {name: values.getlist(name) if kind is list else values.get(name, "") for name, kind in names.items()}


def check_parameters(*names: str) -> None:
    """Raise Problem if the request has another query parameter than ``names``."""
    if unknown := set(request.args) - set(names):
        raise Problem("bad_parameter", f"Unknown parameter {min(unknown)!r}. Valid parameters: {', '.join(names)}.")


def _from_json(body: bytes, names: Mapping[str, type]) -> MultiDict[str, str]:
    hint = f"Send a JSON object with {', '.join(names)}."
    document = parse_json(body, max_values=MAX_VALUES, hint=hint)
    if not isinstance(document, dict):
        raise Problem("bad_json", f"The JSON is not an object. {hint}")
    values: MultiDict[str, str] = MultiDict()
    for name, value in document.items():
        rows = value if isinstance(value, list) else [value]
        if not all(isinstance(row, str) for row in rows) or (isinstance(value, list) and names.get(name) is not list):
            raise Problem("bad_parameter", f"`{name[:40]}` must be text (got {describe(value)}).")
        values.setlist(name, rows)
    return values

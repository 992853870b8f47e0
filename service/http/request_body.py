"""Read a request's body and parse it as JSON, both bounded in size, in time and in work."""

from __future__ import annotations

import json
import math
import socket
from typing import TYPE_CHECKING, Any

from service.http.errors import Problem
from service.http.text_validation import check_text, strings_in

if TYPE_CHECKING:
    from flask import Request

    from service.settings import Settings

OTHER_VALUES = 1_000  # JSON values that a request may contain besides its images: an id, parameters, fields of other clients
SMALLER_UPLOAD = "Send fewer or smaller images."


def read_body(request: Request, settings: Settings, *, max_bytes: int | None = None, advice: str = SMALLER_UPLOAD) -> bytes:
    """Read the body of a request.

    The service's own worker passes only complete bodies (``service.http.gunicorn_worker``). Under another server the read
    waits for the client, up to ``body_timeout_s`` for each packet.

    Args:
        request: The request, whose body Flask has not parsed.
        settings: The limits.
        max_bytes: Size limit. Default: ``max_body_mb``.
        advice: What to do about a body that is too large, as a sentence.

    Raises:
        Problem: The body is compressed, too large, incomplete, malformed or late.
    """
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise Problem(
            "unsupported_media_type",
            f"Compressed bodies are not supported (Content-Encoding: {encoding[:40]}). Send it uncompressed.",
        )
    limit, length = max_bytes or settings.max_body_bytes, request.content_length
    if length is not None and length > limit:
        raise body_too_large(limit, length, advice=advice)
    if length is None and not request.environ.get("wsgi.input_terminated"):
        return b""  # without a length such a server would wait without end
    server_socket = request.environ.get("gunicorn.socket")
    connection = server_socket if isinstance(server_socket, socket.socket) else None
    broken = ""
    try:
        if connection:
            connection.settimeout(settings.body_timeout_s)
        body: bytes = request.environ["wsgi.input"].read(limit + 1 if length is None else length)
    except TimeoutError:
        broken = "late"
    except Exception as error:  # a server's parser raises various types on a malformed body
        broken = type(error).__name__  # not the error itself, whose frames hold the body
    finally:
        if connection:
            connection.settimeout(None)
    if broken == "late":
        raise body_timeout(settings.body_timeout_s)
    if broken:
        raise body_malformed()
    if length is None and len(body) > limit:
        raise body_too_large(limit, advice=advice)
    if length is not None and len(body) < length:
        raise body_incomplete(len(body), length)
    return body


def parse_json(
    body: bytes, *, max_values: int, max_containers: int | None = None, hint: str, size_hint: str | None = None
) -> Any:
    """Parse JSON with a bounded number of values.

    The parser holds the interpreter's lock, and a few bytes of text become an object of dozens of bytes in memory. So its
    work is bounded before it starts: each value but the first of a container follows a comma, and each container begins with
    a bracket. Brackets and commas within strings count too.

    Args:
        body: The JSON, in UTF-8.
        max_values: Max. number of commas, lists and objects.
        max_containers: Max. number of lists and objects. Default: ``max_values``.
        hint: What to send instead, as a sentence.
        size_hint: What to send instead of too much. Default: ``hint``.

    Raises:
        Problem: ``json_too_large``, or ``bad_json`` for invalid JSON or text that cannot be stored.
    """
    containers = body.count(b"[") + body.count(b"{")
    values = containers + body.count(b",")
    for count, limit, name in (
        (containers, max_values if max_containers is None else max_containers, "lists and objects"),
        (values, max_values, "values"),
    ):
        if count > limit:
            raise Problem("json_too_large", f"The JSON has {count:,} {name}, the limit is {limit:,}. {size_hint or hint}")
    try:
        # Decoded here because json.loads() also guesses UTF-16 and UTF-32, and accepts unpaired surrogates.
        document = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Problem("bad_json", f"Invalid JSON ({error}). {hint}") from None
    if b"\\u" in body:  # only an escape can produce what is checked for
        check_text("The JSON", *strings_in(document), code="bad_json")
    return document


def body_too_large(limit: int, length: int | None = None, *, advice: str = SMALLER_UPLOAD) -> Problem:
    """Word the problem of a body of ``length`` bytes, or of unknown length, above the ``limit``."""
    size = "" if length is None else f"{_size(length, math.ceil)}, "
    return Problem("body_too_large", f"Upload too large: {size}the limit is {_size(limit, math.floor)}. {advice}")


def body_timeout(timeout_s: float) -> Problem:
    return Problem("body_timeout", f"The request body was not complete within {timeout_s:g} s. Send it again.")


def body_incomplete(received: int, length: int) -> Problem:
    return Problem("bad_request", f"The request body is incomplete: {received:,} of {length:,} bytes. Send it again.")


def body_malformed() -> Problem:
    return Problem("bad_request", "The request body is incomplete, or its chunks are malformed. Send it again.")


def _size(length: int, rounded: Any) -> str:
    """Format bytes as MB or KB with one decimal. A size is rounded up and a limit down, so that they never look equal."""
    unit, name = (1 << 20, "MB") if length >= 1 << 20 else (1 << 10, "KB")
    return f"{rounded(length / unit * 10) / 10:,.10g} {name}"

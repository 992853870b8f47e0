"""A request's body, read whole: bounded in size, and in the time that it may take to arrive."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from flask import Request

from service.http.errors import Problem
from service.http.lingering_close import MAX_DRAIN_BYTES
from service.http.read_deadline import read_deadlines
from service.settings import Settings

CHUNK_BYTES = 1 << 17
BODY_STATE = "service.http.request_body"
DEFAULT_ADVICE = "send fewer or smaller photos"


def read_body(request: Request, settings: Settings, *, max_bytes: int | None = None, advice: str = DEFAULT_ADVICE) -> bytes:
    """At most ``max_bytes``, ``max_body_mb`` where none are named, within ``body_timeout_s``.

    Raises Problem, which gives ``advice`` to those who sent too much.
    """
    limit, length = max_bytes or settings.max_body_bytes, request.content_length
    request.environ[BODY_STATE] = "begun"
    if length is not None and length > limit:
        raise _too_large(f"{length:,}", limit, advice)
    if length is None and not request.environ.get("wsgi.input_terminated"):
        return b""  # without a length such a server would wait for ever
    connection: socket.socket | None = request.environ.get("gunicorn.socket")
    if connection is not None:
        read_deadlines.begin(connection, settings.body_timeout_s)
    broken = ""
    body = b""
    try:
        body = _read(request, limit, length, advice)
    except Problem:
        raise
    except Exception as error:  # the server's parser raises what it likes on a body that breaks off or is malformed
        broken = repr(error)  # not the error itself, whose frames hold the body
    finally:
        late = connection is not None and read_deadlines.end(connection)
    if late:
        raise Problem("body_timeout", f"The body had not arrived whole within {settings.body_timeout_s:g} s; send it again.")
    if broken:
        raise Problem("bad_request", f"The body could not be read ({broken}); send it again.")
    if length is not None and len(body) < length:
        raise Problem("bad_request", f"{length:,} bytes were announced and {len(body):,} arrived; send it again.")
    request.environ[BODY_STATE] = "whole"
    return body


def has_unread_body(environ: Mapping[str, Any]) -> bool:
    """Whether more of a body is unread than the server reads on behind an answer, before it takes the next request."""
    if BODY_STATE in environ:
        return environ[BODY_STATE] != "whole"
    length = environ.get("CONTENT_LENGTH", "")
    return "HTTP_TRANSFER_ENCODING" in environ or (length.isdecimal() and int(length) >= MAX_DRAIN_BYTES)


def _read(request: Request, limit: int, length: int | None, advice: str) -> bytes:
    source = request.environ["wsgi.input"]
    pieces, size = [], 0
    while length is None or size < length:
        piece = source.read(CHUNK_BYTES if length is None else min(CHUNK_BYTES, length - size))
        if not piece:
            break
        size += len(piece)
        if size > limit:
            raise _too_large(f"More than {limit:,}", limit, advice)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(arrived: str, limit: int, advice: str) -> Problem:
    return Problem("body_too_large", f"{arrived} bytes arrived and {limit:,} is the most; {advice}.")

"""Read a request's body: of bounded size, within a bounded time."""

from __future__ import annotations

import socket

from flask import Request

from service.http.errors import Problem
from service.settings import Settings

DEFAULT_ADVICE = "send fewer or smaller photos"


def read_body(request: Request, settings: Settings, *, max_bytes: int | None = None, advice: str = DEFAULT_ADVICE) -> bytes:
    """Read at most ``max_bytes``, ``max_body_mb`` where none are given.

    The service's own worker hands over bodies that have arrived (``service.http.gunicorn_worker``). Under another server,
    reading waits for the client, and ``body_timeout_s`` is how long for each of its packets.

    Raises:
        Problem: the body is too large, which is answered with ``advice``, broken off, malformed or late.
    """
    limit, length = max_bytes or settings.max_body_bytes, request.content_length
    if length is not None and length > limit:
        raise _too_large(f"{length:,}", limit, advice)
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
    except Exception as error:  # the server's parser raises what it likes on a body that breaks off or is malformed
        broken = repr(error)  # not the error itself, whose frames hold the body
    finally:
        if connection:
            connection.settimeout(None)
    if broken == "late":
        raise Problem("body_timeout", f"The body had not arrived whole within {settings.body_timeout_s:g} s; send it again.")
    if broken:
        raise Problem("bad_request", f"The body could not be read ({broken}); send it again.")
    if length is None and len(body) > limit:
        raise _too_large(f"More than {limit:,}", limit, advice)
    if length is not None and len(body) < length:
        raise Problem("bad_request", f"{length:,} bytes were announced and {len(body):,} arrived; send it again.")
    return body


def _too_large(arrived: str, limit: int, advice: str) -> Problem:
    return Problem("body_too_large", f"{arrived} bytes arrived and {limit:,} is the most; {advice}.")

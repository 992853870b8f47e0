"""An application for the service's gunicorn worker whose response is longer than any buffer."""

from __future__ import annotations

import contextvars
import itertools
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from service.context import EXTENSION
from service.http import CAN_STREAM, EVENT_STREAM
from service.http.admission import AdmissionController
from service.http.middleware import RequestMiddleware
from service.settings import Settings
from service.telemetry.metrics import Metrics

CHUNKS, CHUNK_BYTES = 400, 100_000
request_number: contextvars.ContextVar[int] = contextvars.ContextVar("request_number")
closed = threading.Event()


def _chunks() -> Iterator[bytes]:
    """Set a context variable at the start and reset it at the end, as Flask's ``stream_with_context`` does."""
    token = request_number.set(1)
    try:
        for number in range(CHUNKS):
            assert request_number.get() == 1
            yield bytes([number % 256]) * CHUNK_BYTES
    finally:
        request_number.reset(token)
        closed.set()


def _respond(environ: dict[str, Any], start_response: Any) -> Any:
    if environ["PATH_INFO"] == "/broken":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return _broken()
    if environ["PATH_INFO"] == "/events":
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        if not environ[CAN_STREAM]:
            return [b"full"]
        environ[EVENT_STREAM] = True
        closed.clear()
        return _events()
    if environ["PATH_INFO"] == "/error":
        raise RuntimeError("an error of the application")
    if environ["PATH_INFO"] == "/closed":
        start_response("200 OK", [("Content-Length", "1")])
        return [b"1" if closed.wait(60) else b"0"]
    closed.clear()
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return _chunks()


def _events() -> Iterator[bytes]:
    """Send a number in each chunk, without an end."""
    try:
        for number in itertools.count():
            yield b"%d\n" % number
    finally:
        closed.set()


def _broken() -> Iterator[bytes]:
    yield b"a" * 70_000
    raise RuntimeError("an error within the stream")


class App:
    """A minimal application with what the worker uses."""

    def __init__(self) -> None:
        nothing = re.compile("(?!)")
        self._middleware = RequestMiddleware(
            _respond, AdmissionController(4), Metrics(), inference_paths=nothing, custom_error_paths=nothing
        )
        services = SimpleNamespace(settings=Settings(page_threads=1, studio_max_streams=3), middleware=self._middleware)
        self.extensions = {EXTENSION: services}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        return self._middleware(environ, start_response)


app = App()

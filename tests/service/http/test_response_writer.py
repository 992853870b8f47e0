"""Responses have gunicorn's bytes and are sent at once."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from gunicorn.config import Config
from gunicorn.http import get_parser, wsgi

from service.http.gunicorn_worker import Connection, ResponseBuffer

LENGTH_5 = [("Content-Type", "text/plain"), ("Content-Length", "5")]
NO_LENGTH = [("Content-Type", "text/plain")]


class Recorder:
    """A socket that records each chunk."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    def sendall(self, data: bytes) -> None:
        self.chunks.append(bytes(data))


def respond(to: object, request: str, status: str, headers: list[tuple[str, str]], body: list[bytes]) -> None:
    """Write a response as gunicorn's worker does."""
    config = Config()
    parsed = next(get_parser(config, [f"{request}\r\nHost: here\r\n\r\n".encode()], ("127.0.0.1", 1)))
    response, _ = wsgi.create(parsed, to, ("127.0.0.1", 1), ("127.0.0.1", 2), config)
    response.start_response(status, headers)
    for chunk in body:
        response.write(chunk)
    response.close()


@pytest.mark.parametrize(
    ("request_line", "status", "headers", "body"),
    [
        pytest.param("GET / HTTP/1.1", "200 OK", LENGTH_5, [b"whole"], id="known length"),
        pytest.param("GET / HTTP/1.1", "200 OK", LENGTH_5, [b"wh", b"ole"], id="two writes"),
        pytest.param("GET / HTTP/1.1", "200 OK", LENGTH_5, [b"five and more"], id="longer than its length"),
        pytest.param("GET / HTTP/1.1", "200 OK", NO_LENGTH, [b"a", b"stream"], id="chunked"),
        pytest.param("GET / HTTP/1.1", "200 OK", NO_LENGTH, [b"", b"late"], id="empty first chunk"),
        pytest.param("GET / HTTP/1.0", "200 OK", NO_LENGTH, [b"old"], id="until close"),
        pytest.param("GET / HTTP/1.1", "200 OK", NO_LENGTH, [], id="empty"),
        pytest.param("GET / HTTP/1.1", "204 No Content", [], [], id="no content"),
        pytest.param("HEAD / HTTP/1.1", "200 OK", LENGTH_5, [b""], id="head"),
    ],
)
def test_a_response_has_gunicorns_bytes_and_is_sent_at_once(
    request_line: str, status: str, headers: list[tuple[str, str]], body: list[bytes]
) -> None:
    theirs, connection = Recorder(), Connection(Mock(), None, None)
    ours, connection.transport = ResponseBuffer(connection), Mock()
    respond(ours, request_line, status, headers, body)
    respond(theirs, request_line, status, headers, body)
    connection.send(ours)
    ((sent,), _) = connection.transport.write.call_args

    without_date = [data.split(b"Date: ")[0] + data.split(b" GMT", 1)[1] for data in (sent, b"".join(theirs.chunks))]
    assert without_date[0] == without_date[1]
    connection.transport.write.assert_called_once()

"""Responses have gunicorn's bytes, are sent in as few packets as possible, and never block."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from gunicorn.config import Config
from gunicorn.http import get_parser, wsgi

from service.http.gunicorn_worker import CONGESTED_BYTES, DisconnectedError, ResponseWriter

LENGTH_5 = [("Content-Type", "text/plain"), ("Content-Length", "5")]
NO_LENGTH = [("Content-Type", "text/plain")]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


class Recorder:
    """A socket that records each chunk."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    def sendall(self, data: bytes) -> None:
        self.chunks.append(bytes(data))

    def send(self, data: bytes) -> int:
        self.chunks.append(bytes(data))
        return len(data)


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
    ours, theirs = Recorder(), Recorder()
    writer = ResponseWriter(ours)  # type: ignore[arg-type]
    respond(writer, request_line, status, headers, body)
    writer.flush()
    respond(theirs, request_line, status, headers, body)

    without_date = [b"".join(p).split(b"Date: ")[0] + b"".join(p).split(b" GMT", 1)[1] for p in (ours.chunks, theirs.chunks)]
    assert without_date[0] == without_date[1]
    assert len(ours.chunks) == 1


def test_unsent_bytes_are_buffered_and_sent_later(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    writer, sent = ResponseWriter(ours), b""
    while not writer.is_congested:
        sent += (chunk := bytes([len(sent) % 251]) * 10_000)
        writer.sendall(chunk)
    assert CONGESTED_BYTES <= writer.unsent < len(sent)

    received = b""
    while len(received) < len(sent):
        received += theirs.recv(1 << 16)
        writer.flush()
    assert received == sent
    assert writer.unsent == 0


def test_a_disconnected_client_is_noticed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.close()
    writer = ResponseWriter(ours)
    writer.sendall(b"too late")
    with pytest.raises(DisconnectedError):
        writer.flush()

"""An answer says the same as gunicorn's own, and leaves in as few pieces as it can."""

from __future__ import annotations

import pytest
from gunicorn.config import Config
from gunicorn.http import get_parser, wsgi

import service.http.gunicorn_worker  # noqa: F401 - which puts the answer in gunicorn's place
from service.http.response import Response

LENGTH_5 = [("Content-Type", "text/plain"), ("Content-Length", "5")]
UNTOLD = [("Content-Type", "text/plain")]


class Heard:
    """A socket that keeps what it was given, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def sendall(self, data: bytes) -> None:
        self.pieces.append(bytes(data))


def answered(
    kind: type[wsgi.Response], request: str, status: str, headers: list[tuple[str, str]], body: list[bytes]
) -> list[bytes]:
    """What a client hears of an answer, as gunicorn's worker gives it."""
    config, heard = Config(), Heard()
    asked = next(get_parser(config, [f"{request}\r\nHost: here\r\n\r\n".encode()], ("127.0.0.1", 1)))
    answer = kind(asked, heard, config)
    answer.start_response(status, headers)
    for piece in body:
        answer.write(piece)
    answer.close()
    return heard.pieces


@pytest.mark.parametrize(
    ("request_line", "status", "headers", "body", "pieces"),
    [
        pytest.param("GET / HTTP/1.1", "200 OK", LENGTH_5, [b"whole"], 1, id="known length"),
        pytest.param("GET / HTTP/1.1", "200 OK", LENGTH_5, [b"wh", b"ole"], 2, id="in two pieces"),
        pytest.param("GET / HTTP/1.1", "200 OK", LENGTH_5, [b"whole and more"], 1, id="more than was said"),
        pytest.param("GET / HTTP/1.1", "200 OK", UNTOLD, [b"a", b"stream"], 3, id="chunked"),
        pytest.param("GET / HTTP/1.1", "200 OK", UNTOLD, [b"", b"late"], 3, id="nothing at first"),
        pytest.param("GET / HTTP/1.0", "200 OK", UNTOLD, [b"old"], 1, id="until the end"),
        pytest.param("GET / HTTP/1.1", "200 OK", UNTOLD, [], 2, id="empty"),
        pytest.param("GET / HTTP/1.1", "204 No Content", [], [], 1, id="no content"),
        pytest.param("HEAD / HTTP/1.1", "200 OK", LENGTH_5, [b""], 1, id="head"),
    ],
)
def test_the_bytes_are_gunicorns_and_the_first_leave_together(
    request_line: str, status: str, headers: list[tuple[str, str]], body: list[bytes], pieces: int
) -> None:
    ours = answered(Response, request_line, status, headers, body)
    theirs = answered(Response.__base__, request_line, status, headers, body)  # type: ignore[arg-type]

    without_date = [b"".join(p).split(b"Date: ")[0] + b"".join(p).split(b" GMT", 1)[1] for p in (ours, theirs)]
    assert without_date[0] == without_date[1]
    assert len(ours) == pieces
    assert len(ours) <= len(theirs)


def test_the_server_answers_with_it() -> None:
    config = Config()
    asked = next(get_parser(config, [b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"], ("127.0.0.1", 1)))
    answer, _ = wsgi.create(asked, Heard(), ("127.0.0.1", 1), ("127.0.0.1", 2), config)
    assert type(answer) is Response

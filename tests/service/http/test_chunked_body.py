"""Chunked bodies are decoded as they arrive, and end where gunicorn's own reader sees their end."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest
from gunicorn.config import Config
from gunicorn.http import get_parser

from service.http.errors import Problem
from service.http.gunicorn_worker import MAX_HEAD_BYTES, Connection, DisconnectedError, receive_chunks

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
MALFORMED = [
    b"zz\r\n",
    b"-5\r\nabc",
    b"1_0\r\n",
    b"A \r\n",
    b"\r\n",
    b"3\nabc",
    b"5\r\nabcdefgh\r\n",
    b"3\r\nabc0\r\n\r\n",
    b"5;" + b"x" * 9000,
    b"0\r\nno trailer\r\n\r\n",
    b"0\r\n: no name\r\n\r\n",
    b"0\r\nA: b\n\r\n",
]


def receive(*pieces: bytes, limit: int = 1000, then_close: bool = False) -> tuple[bytes, bytes]:
    """Feed ``pieces`` one by one. Returns the decoded body and what follows it."""
    worker = Mock(receive_buffer=memoryview(bytearray(1 << 20)))
    connection = Connection(worker, None, None)
    connection.transport = Mock()

    async def run() -> bytes:
        task: asyncio.Task[bytes] = asyncio.ensure_future(receive_chunks(connection, limit))
        for piece in pieces:
            await asyncio.sleep(0)
            assert not task.done()
            worker.receive_buffer[: len(piece)] = piece
            connection.buffer_updated(len(piece))
        if then_close:
            await asyncio.sleep(0)
            connection.eof_received()
        return await task

    with ThreadPoolExecutor(1) as pool:  # a browser that an earlier test of this process opened has a loop in the main thread
        body = pool.submit(lambda: asyncio.run(run())).result()
    return body, bytes(connection.buffer)


def parsed_by_gunicorn(body: bytes) -> tuple[bytes, bytes]:
    parser: Any = get_parser(Config(), [HEAD, body], ("127.0.0.1", 1))
    return next(parser).body.read(), parser.unreader.take_buffered()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"0\r\n\r\n", b""),
        (b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
        (b"003;a=b;c\r\nabc\r\nA ;x\r\n0123456789\r\n00\r\nX-Trailer: x\r\nOther: y\r\n\r\n", b"abc0123456789"),
        (b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n"),
    ],
)
def test_a_body_is_joined_and_ends_where_gunicorn_sees_its_end(body: bytes, expected: bytes) -> None:
    bytewise = [body[i : i + 1] for i in range(len(body))]
    assert receive(*bytewise) == (expected, b"")
    for extra in (b"", b"GET / HTTP/1.1\r\n\r\n"):
        assert receive(body + extra) == parsed_by_gunicorn(body + extra) == (expected, extra)


@pytest.mark.parametrize("body", MALFORMED)
def test_a_malformed_body_is_rejected_without_waiting_for_its_end(body: bytes) -> None:
    with pytest.raises(Problem) as caught:
        receive(body)
    assert caught.value.code == "bad_request"
    with pytest.raises(Exception, match=r".*"):
        parsed_by_gunicorn(body)


def test_an_incomplete_body_is_a_disconnect() -> None:
    for body in (b"3\r\nab", b"3\r\nabc\r\n", b"3", b"0\r\nA: b\r\n"):
        with pytest.raises(DisconnectedError):
            receive(body, then_close=True)


def test_the_size_is_bounded() -> None:
    assert receive(b"a\r\n0123456789\r\n0\r\n\r\n", limit=10)[0] == b"0123456789"
    endless_trailer = b"0\r\n" + b"A: b\r\n" * (MAX_HEAD_BYTES // 6 + 1)
    for body in (b"b\r\n", b"a\r\n0123456789\r\n1\r\n", (b"1;" + b"x" * 8000 + b"\r\na\r\n") * 9):
        with pytest.raises(Problem) as caught:
            receive(body, limit=10)
        assert caught.value.code == "body_too_large"
    with pytest.raises(Problem) as caught:
        receive(endless_trailer)
    assert caught.value.code == "bad_request"

"""Streamed responses follow their client's pace and occupy no thread meanwhile."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.server import RESPONSE_TIMEOUT_S, ROOT, poll
from tests.helpers.streaming_app import CHUNK_BYTES, CHUNKS

pytestmark = pytest.mark.slow


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--threads", "2"]
    command += ["--worker-class", "service.http.gunicorn_worker.EventLoopWorker", "tests.helpers.streaming_app:app"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=file)
    try:
        yield int(poll(lambda: re.findall(r"Listening at: http://127\.0\.0\.1:(\d+)", log.read_text()))[0])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(RESPONSE_TIMEOUT_S) == 0


def ask(port: int, path: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=RESPONSE_TIMEOUT_S)
    connection.request("GET", path)
    return connection, connection.getresponse()


def read_all(port: int, path: str) -> tuple[int, bytes]:
    connection, response = ask(port, path)
    try:
        return response.status, response.read()
    finally:
        connection.close()


def test_streams_arrive_completely_at_every_pace_with_one_thread(port: int) -> None:
    opened = [ask(port, "/") for _ in range(6)]
    _, fast = opened[3]
    assert fast.read() == b"".join(bytes([number % 256]) * CHUNK_BYTES for number in range(CHUNKS))
    for number in range(CHUNKS):
        for slow in (opened[0][1], opened[5][1]):
            assert slow.read(CHUNK_BYTES) == bytes([number % 256]) * CHUNK_BYTES
    assert opened[0][1].read() == b""
    for connection, response in opened:
        response.close()
        connection.close()


def test_an_abandoned_stream_is_closed(port: int) -> None:
    connection, response = ask(port, "/")
    assert response.read(10) == bytes(10)
    response.close()
    connection.close()
    assert read_all(port, "/closed") == (200, b"1")


def test_an_error_within_a_stream_closes_the_connection(port: int) -> None:
    connection, response = ask(port, "/broken")
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        response.read()
    connection.close()


def test_an_error_before_the_first_chunk_is_a_500(port: int) -> None:
    assert read_all(port, "/error")[0] == 500
    assert read_all(port, "/")[0] == 200


def test_events_occupy_no_thread_between_them_and_their_number_is_bounded(port: int) -> None:
    opened = [ask(port, "/events") for _ in range(3)]
    for number in range(2):
        for _, response in opened:
            assert response.readline() == b"%d\n" % number
    assert read_all(port, "/events") == (200, b"full")
    connection, response = opened.pop()
    response.close()
    connection.close()
    assert read_all(port, "/closed") == (200, b"1")  # there is one thread, and two streams are open
    opened.append(ask(port, "/events"))
    assert opened[-1][1].readline() == b"0\n"
    for connection, response in opened:
        response.close()
        connection.close()

"""Contract tests for the internals of gunicorn that the service's worker uses."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
from gunicorn import http
from gunicorn.config import Config
from gunicorn.http import errors, wsgi
from gunicorn.workers.base import Worker

HERE = ("127.0.0.1", 1)
POST = b"POST /a%20b?c=d HTTP/1.1\r\nHost: localhost\r\n"


class Socket:
    """The methods of a socket that a response may use."""

    def __init__(self) -> None:
        self.sent = b""

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def gettimeout(self) -> float:
        return 0.0


def parse(*source: bytes) -> Any:
    return next(http.get_parser(Config(), list(source), HERE))


def test_the_parser_takes_an_iterable_and_reports_an_incomplete_head() -> None:
    request = parse(POST + b"Content-Length: 5\r\n\r\n")
    assert (request.method, request.path, request.query, request.version) == ("POST", "/a%20b", "c=d", (1, 1))
    assert request.headers == [("HOST", "localhost"), ("CONTENT-LENGTH", "5")]
    assert not request.should_close()
    request.force_close()
    assert request.should_close()
    with pytest.raises(errors.NoMoreData):
        parse(POST)
    with pytest.raises(StopIteration):
        parse(b"")
    with pytest.raises(errors.LimitRequestHeaders):
        parse(POST + b"A: b\r\n" * 101 + b"\r\n")


def test_no_second_continue_is_sent() -> None:
    request = parse(POST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
    assert request._expected_100_continue is True
    request._expected_100_continue = False
    sock = Socket()
    _, environ = wsgi.create(request, sock, HERE, ("127.0.0.1", 8000), Config())
    assert sock.sent == b""
    assert (environ["PATH_INFO"], environ["REQUEST_METHOD"], environ["CONTENT_LENGTH"]) == ("/a b", "POST", "5")
    assert environ["gunicorn.socket"] is sock


def test_a_response_only_calls_sendall_and_counts_what_it_wrote() -> None:
    sock = Socket()
    response, _ = wsgi.create(parse(POST + b"\r\n"), sock, HERE, HERE, Config())
    assert not response.headers_sent
    response.start_response("200 OK", [("Content-Length", "5")])
    response.write(b"abc")
    assert (response.headers_sent, response.response_length, response.sent) == (True, 5, 3)
    response.write(b"de")
    response.close()
    assert response.sent == 5
    assert sock.sent.startswith(b"HTTP/1.1 200 OK\r\n")
    assert sock.sent.endswith(b"\r\n\r\nabcde")
    assert not response.should_close()
    response.force_close()
    assert response.should_close()


@pytest.mark.parametrize(
    ("error", "status"),
    [(errors.InvalidHeader("A"), b"400"), (errors.LimitRequestHeaders("x"), b"431"), (ValueError("x"), b"500")],
)
def test_errors_are_sent_through_the_socket(error: Exception, status: bytes) -> None:
    class Log(logging.LoggerAdapter):  # type: ignore[type-arg]
        def access(self, *_: object) -> None:
            pass

    worker = Worker.__new__(Worker)
    worker.cfg, worker.log = Config(), Log(logging.getLogger("test"))
    for request in (None, parse(POST + b"\r\n")):
        sock = Socket()
        worker.handle_error(request, sock, HERE, error)
        assert sock.sent.startswith(b"HTTP/1.1 " + status)
        assert b"\r\nConnection: close\r\n" in sock.sent


def test_signals_wake_the_loop_through_the_pipe() -> None:
    code = """
import os, signal
from gunicorn.workers.base import Worker
worker = Worker.__new__(Worker)
worker.alive, worker.PIPE = True, os.pipe()
os.set_blocking(worker.PIPE[1], False)
worker.init_signals()
os.kill(os.getpid(), signal.SIGTERM)
print(os.read(worker.PIPE[0], 1) != b"", worker.alive)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "True False\n"

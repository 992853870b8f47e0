"""Slow, idle, unread and too many connections: good requests succeed while they are open."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import SharedServer
from tests.helpers.raw_connection import RED, RawConnection, hold_requests, in_flight, probabilities
from tests.helpers.server import RESPONSE_TIMEOUT_S, Server, poll, serve

pytestmark = pytest.mark.slow

GET = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n"
RELAXED = {"first_byte_timeout_s": 300, "head_timeout_s": 300, "send_timeout_s": 300}  # attackers stay connected


@contextlib.contextmanager
def open_connections(server: Server, count: int, data: bytes = b"") -> Iterator[list[RawConnection]]:
    """Open ``count`` connections that send ``data`` and nothing more."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(RawConnection(server)) for _ in range(count)]
        for connection in opened:
            connection.socket.sendall(data)
        yield opened


def check_health(server: Server, worker: int) -> None:
    """Check that the worker is the same and serves every kind of request."""
    assert server.workers() == [worker]
    for path in ("/health/live", "/health/ready", "/metrics", "/openapi.json"):
        assert server.get(path).status == 200, path
    assert probabilities(server.post(RED, "image/png"))


def cuts(server: Server, reason: str) -> float:
    return server.metrics().get(f'http_connections_cut_total{{reason="{reason}"}}', 0)


def rejections(server: Server, reason: str) -> float:
    return server.metrics().get(f'http_requests_rejected_total{{reason="{reason}"}}', 0)


def wait_for_close(connection: RawConnection) -> bool:
    """Read until the server closes the connection."""
    try:
        while connection.socket.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


# Clients that do not read


@contextlib.contextmanager
def unread_responses(server: Server, count: int) -> Iterator[list[socket.socket]]:
    """Open connections that request much and read nothing."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.settimeout(RESPONSE_TIMEOUT_S)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(GET % b"/openapi.json" * 60)
            opened.append(sock)
        yield opened


def test_unread_responses_occupy_no_thread(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, threads=4, page_queue=1000, **RELAXED) as server:
        (worker,) = server.workers()
        with unread_responses(server, 20):
            for _ in range(5):
                check_health(server, worker)
            assert cuts(server, "send_timeout") == 0


def test_unread_responses_are_cut_and_do_not_delay_a_stop(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, page_queue=1000, send_timeout_s=0.5) as server:
        with unread_responses(server, 10):
            poll(lambda: cuts(server, "send_timeout") == 10)
        with unread_responses(server, 10):
            assert server.stop() == 0


def test_a_slow_reader_gets_its_complete_response(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, send_timeout_s=300) as server:
        whole = server.get("/openapi.json", headers={"Host": "localhost"}).body
        with unread_responses(server, 1) as (sock,), sock.makefile("rb") as source:
            for _ in range(60):
                while source.readline() != b"\r\n":
                    pass
                assert source.read(len(whole)) == whole


# Clients that are silent or slow


def test_idle_connections_do_not_exhaust_open_files(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, max_files=256, **RELAXED) as server:
        (worker,) = server.workers()
        with open_connections(server, 400):
            check_health(server, worker)
            assert cuts(server, "connection_limit") >= 400 - 256
            assert server.metrics()["http_connections"] <= 128
        assert [line for line in server.log() if line["level"] in ("ERROR", "CRITICAL")] == []


def test_a_worker_without_free_files_pauses_and_continues(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, **RELAXED) as server:
        (worker,) = server.workers()
        check_health(server, worker)
        limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        highest = max(int(file.name) for file in Path(f"/proc/{worker}/fd").iterdir())
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (highest + 4, limits[1]))
        with open_connections(server, 50):
            assert server.get("/health/live").status == 200
            resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
            check_health(server, worker)
            assert cuts(server, "file_limit") >= 1
        assert [line for line in server.log() if line["level"] in ("ERROR", "CRITICAL")] == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /health/live HTTP/1.1\r\nX-Slow: ",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nx",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"POST /gallery/review HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
        b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n",
    ],
    ids=["silent", "head", "body", "chunks", "page", "probe"],
)
def test_slow_clients_occupy_neither_threads_nor_slots(shared_server: SharedServer, data: bytes) -> None:
    server = shared_server(max_in_flight=2, max_images=2, threads=2, page_queue=2, **RELAXED)
    (worker,) = server.workers()
    with open_connections(server, 200, data):
        for _ in range(3):
            check_health(server, worker)
        assert in_flight(server) == 0


def test_timeouts_close_connections_and_are_counted(tiny_bundle: SimpleNamespace) -> None:
    slow = {"first_byte_timeout_s": 0.3, "head_timeout_s": 0.3, "body_timeout_s": 0.3}
    with serve(tiny_bundle.path, **slow) as server:
        for reason, data in {
            "first_byte_timeout": b"",
            "head_timeout": b"GET / HTTP/1.1\r\n",
            "body_timeout": b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n",
        }.items():
            with open_connections(server, 3, data) as opened:
                assert all(wait_for_close(connection) for connection in opened)
            assert cuts(server, reason) == 3


def test_bytes_of_incomplete_requests_are_bounded(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, max_body_mb=1, max_buffered_mb=1) as server, contextlib.ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(RawConnection(server))
            connection.socket.sendall(connection.head(900_000) + bytes(300_000))
        poll(lambda: cuts(server, "buffer_limit") >= 5)  # three of them fit
        assert probabilities(server.post(RED, "image/png"))
        assert cuts(server, "buffer_limit") == 5


def test_padded_chunks_are_rejected(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, max_body_mb=0.1) as server, RawConnection(server) as connection:
        connection.socket.sendall(connection.head("chunked") + (b"1;" + b"x" * 8000 + b"\r\na\r\n") * 40)
        assert connection.response().code == "body_too_large"
        assert connection.is_closed()


# Too many connections


def test_connections_without_a_request_are_evicted_first_then_the_longest_idle(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, max_connections=16, **RELAXED) as server, contextlib.ExitStack() as stack:

        def used() -> RawConnection:
            connection = stack.enter_context(RawConnection(server))
            connection.socket.sendall(GET % b"/health/live")
            assert connection.response().status == 200
            return connection

        def is_open(connection: RawConnection) -> bool:
            connection.socket.sendall(GET % b"/health/live")
            return connection.response().status == 200

        idle = [used() for _ in range(4)]
        with open_connections(server, 100):
            assert probabilities(server.post(RED, "image/png"))
            assert all(is_open(connection) for connection in idle)
        later = [used() for _ in range(16)]
        assert all(wait_for_close(connection) for connection in idle)
        assert all(is_open(connection) for connection in later[1:])


def test_pages_starve_neither_predictions_nor_probes(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, page_threads=1, page_queue=1) as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        try:
            with open_connections(server, 50, GET % b"/openapi.json") as opened:
                os.kill(worker, signal.SIGCONT)
                assert server.get("/health/live").status == 200
                assert probabilities(server.post(RED, "image/png"))
                replies = [connection.response() for connection in opened]
        finally:
            os.kill(worker, signal.SIGCONT)
        seen = Counter(response.status for response in replies)
        assert seen.keys() == {200, 503}
        assert all(
            response.code == "overloaded" and response.headers["Retry-After"] for response in replies if response.status == 503
        )
        assert rejections(server, "page_queue_full") == seen[503]
        assert server.get("/openapi.json").status == 200


# What must not bypass admission


@pytest.fixture
def full(shared_server: SharedServer) -> Iterator[Server]:
    """A server at its capacity of four images."""
    server = shared_server(max_in_flight=4, max_images=4)
    with hold_requests(server, 4):
        yield server


@pytest.mark.parametrize(
    "path", ["/predict", "//predict", "///predict", "/pre%64ict", "/%2Fpredict", "//predict?top_k=1", "//"]
)
def test_every_spelling_of_a_path_counts_for_admission(full: Server, path: str) -> None:
    with RawConnection(full) as connection:
        connection.socket.sendall(connection.head(len(RED), path=path) + RED)
        assert connection.response().status == 503
    assert in_flight(full) == 4


def test_the_inference_protocol_words_its_own_rejection(full: Server) -> None:
    name = full.get("/models").json()["models"][0]["name"]
    for path in (f"/v2/models/{name}/infer", f"//v2/models/{name}/infer"):
        with RawConnection(full) as connection:
            connection.socket.sendall(connection.head(len(RED), path=path) + RED)
            response = connection.response()
            assert response.status == 503
            assert "The server is at capacity (4 of 4 images in flight)." in response.json()["error"]


def test_requests_without_inference_are_served_at_capacity(full: Server) -> None:
    assert full.request("OPTIONS", "/predict").status == 200
    assert full.request("OPTIONS", "//predict").status == 200
    assert full.get("/predict").status == 405
    assert full.get("//health/live").status == 200
    assert in_flight(full) == 4


LENGTH = str(len(RED)).encode()
PLAIN = [b"POST /predict HTTP/1.1", b"Host: localhost", b"Content-Type: image/png", b"Content-Length: " + LENGTH]
HEADS = {
    "plain": PLAIN,
    "two hosts": [*PLAIN, b"Host: y"],
    "two content types": [*PLAIN, b"Content-Type: text/html"],
    "two equal lengths": [*PLAIN, b"Content-Length: " + LENGTH],
    "two lengths": [*PLAIN, b"Content-Length: 5"],
    "a list of lengths": [*PLAIN[:3], b"Content-Length: %b, %b" % (LENGTH, LENGTH)],
    "a signed length": [*PLAIN[:3], b"Content-Length: +" + LENGTH],
    "a length in another script": [*PLAIN[:3], b"Content-Length: \xb2"],
    "length with an underscore": [*PLAIN, b"Content_Length: 5"],
    "a space before the colon": [*PLAIN[:3], b"Content-Length : " + LENGTH],
    "length and chunks": [*PLAIN, b"Transfer-Encoding: chunked"],
    "an unknown encoding": [*PLAIN, b"Transfer-Encoding: xchunked"],
    "folded": [*PLAIN, b"X-A: b", b" c"],
    "bare LF": [*PLAIN, b"X-A: b\nX-B: c"],
    "bare CR": [*PLAIN, b"X-A: b\rX-B: c"],
    "NUL": [*PLAIN, b"X-A: b\0c"],
    "no name": [*PLAIN, b": a"],
    "101 headers": [*PLAIN, *(b"X-%d: a" % i for i in range(101))],
    "a long header": [*PLAIN, b"X-A: " + b"a" * 9000],
    "a long line": [b"POST /predict?" + b"a" * 9000 + b" HTTP/1.1", *PLAIN[1:]],
    "lower case": [b"post /predict HTTP/1.1", *PLAIN[1:]],
    "HTTP/1.0": [b"POST /predict HTTP/1.0", *PLAIN[1:]],
    "HTTP/2.0": [b"POST /predict HTTP/2.0", *PLAIN[1:]],
    "an unknown expectation": [*PLAIN, b"Expect: miracles"],
    "no host": [PLAIN[0], *PLAIN[2:]],
    "another path": [b"POST /predict;x HTTP/1.1", *PLAIN[1:]],
    "absolute": [b"POST http://elsewhere/predict HTTP/1.1", *PLAIN[1:]],
    "an empty line before it": [b"", *PLAIN],
}


def test_heads_get_the_same_status_at_capacity(shared_server: SharedServer) -> None:
    server = shared_server(max_in_flight=4, max_images=4)

    def statuses() -> dict[str, int]:
        result = {}
        for name, head in HEADS.items():
            with RawConnection(server) as connection:
                connection.socket.sendall(b"\r\n".join(head) + b"\r\n\r\n" + RED)
                result[name] = connection.response().status
        return result

    idle = statuses()
    assert idle["plain"] == 200
    assert (idle["no host"], idle["two hosts"], idle["101 headers"]) == (400, 400, 431)
    assert sum(400 <= status < 502 for status in idle.values()) >= 18
    codes = {400: "bad_request", 414: "uri_too_long", 431: "headers_too_large"}
    for name in ("no host", "two hosts", "101 headers", "a long line"):
        with RawConnection(server) as connection:
            connection.socket.sendall(b"\r\n".join(HEADS[name]) + b"\r\n\r\n")
            response = connection.response()
        problem = response.json()
        assert response.headers["Content-Type"] == "application/problem+json"
        assert (problem["code"], problem["status"]) == (codes[response.status], response.status)
        assert problem["detail"].startswith("The request line or the headers are invalid: ")
    with hold_requests(server, 4):
        assert statuses() == {name: 503 if status == 200 else status for name, status in idle.items()}


# Headers that only a proxy may set


@pytest.mark.parametrize("worker", ["tuned", "stock"])
def test_headers_of_a_proxy_are_ignored_without_one(shared_server: SharedServer, worker: str) -> None:
    forged = {"SCRIPT_NAME": "//evil.example", "X-Forwarded-Prefix": "//evil.example", "X-Forwarded-Host": "evil.example"}
    server = shared_server(**({} if worker == "tuned" else {"gunicorn_worker": worker}))
    response = server.get("/openapi.json", headers=forged | {"X-Forwarded-Proto": "https"})
    assert response.json()["servers"] == [{"url": server.url}]


def test_other_host_names_are_rejected_on_a_loopback_address(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, allowed_hosts="") as server:
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]", "[::1]:80"):
            assert server.get("/models", headers={"Host": host}).status == 200, host
        for host in (
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "192.168.0.1",
            "",
        ):
            for path in ("/models", "/gallery", "/predict", "/v2", "/nowhere"):
                assert server.get(path, headers={"Host": host}).status == 400, host
            assert server.get("/health/ready", headers={"Host": host}).status == 200, host
        detail = 'Unknown host "evil.example". Use localhost or 127.0.0.1 or [::1], or add it to ALLOWED_HOSTS.'
        assert server.get("/models", headers={"Host": "evil.example"}).json()["detail"] == detail
    with serve(tiny_bundle.path, allowed_hosts="cats.example, .dogs.example") as server:
        for host, status in {"cats.example:8000": 200, "a.dogs.example": 200, "localhost": 400, "a.cats.example": 400}.items():
            assert server.get("/models", headers={"Host": host}).status == status, host


# Half-closed connections and stops


@pytest.mark.parametrize("path", ["/predict", "/", "/v2/models/tiny/infer"])
def test_a_half_closed_connection_gets_its_response(shared_server: SharedServer, path: str) -> None:
    with RawConnection(shared_server()) as connection:
        connection.socket.sendall(connection.head(len(RED), path=path) + RED)
        connection.socket.shutdown(socket.SHUT_WR)
        response = connection.response()
        assert response.status != 504
        if path == "/predict":
            assert probabilities(response)
        assert connection.is_closed()


def test_a_half_closed_connection_gets_its_response_after_a_wait(shared_server: SharedServer) -> None:
    server = shared_server()
    with hold_requests(server, 1) as accepted:
        for connection in accepted.connections:
            connection.socket.shutdown(socket.SHUT_WR)
        accepted.send(1)
        poll(lambda: in_flight(server) == 2)
        assert all(probabilities(response) for response in accepted.responses())


def test_a_stop_serves_connections_in_the_backlog(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path) as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        try:
            with open_connections(server, 40, GET % b"/health/live") as opened:
                server.process.send_signal(signal.SIGTERM)
                poll(lambda: any("signal: term" in line["message"] for line in server.log()))
                os.kill(worker, signal.SIGCONT)
                assert [connection.response().status for connection in opened] == [200] * 40
                assert all(connection.is_closed() for connection in opened)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
        assert server.process.wait(RESPONSE_TIMEOUT_S) == 0
        assert all(line["level"] == "INFO" for line in server.log())


def test_a_stop_does_not_wait_for_idle_clients(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, **RELAXED) as server, open_connections(server, 20) as opened:
        server.process.send_signal(signal.SIGTERM)
        assert all(wait_for_close(connection) for connection in opened)
        assert server.process.wait(RESPONSE_TIMEOUT_S) == 0


# The stock worker


def test_the_stock_worker_serves_and_admits(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, gunicorn_worker="stock", max_in_flight=4, max_images=4) as server:
        assert probabilities(server.post(RED, "image/png"))
        assert server.post([RED[:10], RED[10:]], "image/png").status == 200
        with hold_requests(server, 4) as accepted:
            assert server.post(RED, "image/png").code == "overloaded"
            assert server.post(RED, "image/png", path="//predict").code == "overloaded"
            assert server.get("/health/live").status == 200
            assert all(probabilities(response) for response in accepted.responses())
        poll(lambda: in_flight(server) == 0)
        assert server.stop() == 0


def test_the_stock_worker_times_out_a_missing_body(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, gunicorn_worker="stock", body_timeout_s=0.4) as server, RawConnection(server) as connection:
        connection.send_half()
        assert connection.response().code == "body_timeout"

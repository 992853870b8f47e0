"""The service above its capacity: how requests are rejected, and what happens to accepted ones."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest

from tests.conftest import SharedServer
from tests.helpers.raw_connection import HEAVY, RED, RawConnection, hold_requests, in_flight, probabilities, send_with_retry
from tests.helpers.server import RESPONSE_TIMEOUT_S, Response, Server, multipart, poll, serve

pytestmark = pytest.mark.slow

ID = "0123456789abcdef-of-client"


@pytest.fixture
def full(shared_server: SharedServer) -> Iterator[Server]:
    """A server at its capacity of four images."""
    server = shared_server(max_in_flight=4, max_images=4)
    with hold_requests(server, 4):
        yield server


def check_rejection(response: Response, *, request_id: str | None = None) -> None:
    assert (response.status, response.code) == (503, "overloaded"), response.body
    assert 1 <= int(response.headers["Retry-After"]) <= 60
    assert f"Retry in {response.headers['Retry-After']} s." in response.json()["detail"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.json()["request_id"] == response.headers["X-Request-ID"]
    if request_id:
        assert response.headers["X-Request-ID"] == request_id


def test_at_capacity_requests_are_rejected_and_accepted_ones_finish(shared_server: SharedServer) -> None:
    server = shared_server(max_in_flight=4, max_images=4)
    before = server.metrics()
    with hold_requests(server, 4) as accepted:
        for body, kind in ((RED, "image/png"), multipart(("file", "a.png", RED))):
            check_rejection(server.post(body, kind))
        assert server.get("/health/live").status == 200
        assert server.get("/health/ready").status == 200
        for response in accepted.responses():
            assert probabilities(response)
    poll(lambda: in_flight(server) == 0)
    assert probabilities(server.post(RED, "image/png"))
    after = server.metrics()
    for name in ('http_problems_total{code="overloaded"}', 'http_requests_rejected_total{reason="at_capacity"}'):
        assert after[name] - before.get(name, 0) == 2


def test_a_rejection_arrives_whatever_the_size_of_the_body(shared_server: SharedServer) -> None:
    """A rejection is sent before the body is read. A client that is still sending must get it nevertheless."""
    server = shared_server(max_in_flight=1, max_images=1)
    with hold_requests(server, 1):
        for size in (10_000, 300_000, 3_000_000, 15_000_000):
            response = send_with_retry(partial(server.post, bytes(size), "image/png"))
            assert (response.status, response.code) == (503, "overloaded"), size


@pytest.mark.parametrize(
    ("path", "status", "length"),
    [("/predict", 503, 1_000), ("/predict", 503, 100_000), ("/predict", 413, 30_000_000), ("/nowhere", 404, 100_000)],
)
def test_a_response_states_whether_the_connection_is_kept(
    shared_server: SharedServer, path: str, status: int, length: int
) -> None:
    """A request that a client sends on a connection that is being closed would be lost.

    At capacity a body above the limit is rejected as too large, because a later attempt would fail too.
    """
    with contextlib.ExitStack() as stack:
        server = shared_server(max_in_flight=1, max_images=1)
        if path == "/predict":
            stack.enter_context(hold_requests(server, 1))
        connection = stack.enter_context(RawConnection(server))
        connection.socket.sendall(connection.head(length, path=path) + bytes(min(length, 100_000)))
        response = connection.response()
        assert response.status == status
        if length < 65_536 or status == 404:  # so much of an unread body is discarded to keep the connection
            assert response.headers["Connection"] == "keep-alive"
            connection.socket.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.response().status == 200
        else:
            assert response.headers["Connection"] == "close"
            assert connection.is_closed()


def test_an_overloaded_server_keeps_serving(shared_server: SharedServer) -> None:
    server = shared_server(max_in_flight=4, max_images=4)
    before = server.metrics()

    def client(_: int) -> Counter[int]:
        seen: Counter[int] = Counter()
        for _ in range(15):
            response = server.post(HEAVY, "image/png")
            seen[response.status] += 1
            assert response.status == 200 or (response.code == "overloaded" and int(response.headers["Retry-After"]) >= 1)
        return seen

    with ThreadPoolExecutor(12) as clients:
        futures = [clients.submit(client, i) for i in range(12)]
        while not all(future.done() for future in futures):
            assert server.get("/health/ready").status == 200
        seen = sum((future.result() for future in futures), Counter())
    assert seen.keys() == {200, 503}
    poll(lambda: in_flight(server) == 0)
    metrics = server.metrics()
    for status, count in seen.items():
        name = f'http_requests_total{{method="POST",route="/predict",status="{status}"}}'
        assert metrics[name] - before.get(name, 0) == count


# Responses on one connection


def test_rejections_on_one_connection_have_their_own_ids(full: Server) -> None:
    with RawConnection(full) as connection:
        seen = set()
        for client_id in (None, ID, None, "short", "x" * 64, "y" * 65, "not an id, as it has spaces", None):
            connection.socket.sendall(connection.head(len(RED), **({"X_Request_ID": client_id} if client_id else {})) + RED)
            response = connection.response()
            check_rejection(response, request_id=client_id if client_id in (ID, "short", "x" * 64) else None)
            seen.add(response.headers["X-Request-ID"])
        assert len(seen) == 8
        assert not any("y" * 65 in request_id or " " in request_id for request_id in seen)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n",
        b"POST /predict?top_k=2 HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\nconnection: keep-alive\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost:localhost\r\nContent-Length:\t%d\r\nAccept: */*\r\nUser-Agent: \xc3\xa9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, Close\r\nContent-Length: %d\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nOrigin: http://x\r\nContent-Length: %d\r\n\r\n",
        b"POST /predict HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n",
        b"POST http://x/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 8000 + b"\r\nContent-Length: %d\r\n\r\n",
    ],
    ids=["plain", "other case", "other spaces", "close", "with an origin", "HTTP/1.0", "absolute", "long"],
)
def test_the_rejection_is_the_same_for_every_form_of_head(full: Server, head: bytes) -> None:
    with RawConnection(full) as connection:
        connection.socket.sendall(head % len(RED) + RED)
        response = connection.response()
        check_rejection(response)
        plain = full.post(RED, "image/png")
        own = {"Date", "X-Request-ID", "Connection"}
        assert {**response.headers} | dict.fromkeys(own) == {**plain.headers} | dict.fromkeys(own)
        ends = b"close" in head.lower() or b"HTTP/1.0" in head
        assert response.headers["Connection"] == ("close" if ends else "keep-alive")
        if ends:
            assert connection.is_closed()
        else:
            connection.socket.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.response().status == 200


def test_a_chunked_request_is_rejected_too(full: Server) -> None:
    with RawConnection(full) as connection:
        connection.socket.sendall(connection.head("chunked") + b"3\r\nabc\r\n0\r\n\r\n")
        check_rejection(connection.response())


def test_a_request_that_expects_continue_is_rejected_before_its_body(full: Server) -> None:
    with RawConnection(full) as connection:
        connection.socket.sendall(connection.head(len(RED), Expect="100-continue"))
        check_rejection(connection.response())


@pytest.mark.parametrize("lengths", [(b"5", b"5"), (b"5", b"0"), (b"0", b"5")])
def test_two_lengths_are_invalid(full: Server, lengths: tuple[bytes, bytes]) -> None:
    with RawConnection(full) as connection:
        connection.socket.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %b\r\ncontent-length: %b\r\n\r\nGET /" % lengths
        )
        assert connection.response().status == 400
        assert connection.is_closed()


def test_the_late_body_of_a_rejected_request_is_not_parsed_as_a_request(full: Server) -> None:
    """A head is rejected before its body arrives, which must not be parsed as the next request."""
    body = b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100
    with RawConnection(full) as connection:
        for pieces in (1, 2, 30):
            connection.socket.sendall(connection.head(len(body)))
            check_rejection(connection.response())
            for i in range(pieces):
                connection.socket.sendall(body[len(body) * i // pieces : len(body) * (i + 1) // pieces])
            connection.socket.sendall(connection.head(len(body), X_Request_ID=ID) + body)
            check_rejection(connection.response(), request_id=ID)


def test_pipelined_requests_are_rejected_and_served_in_order(full: Server) -> None:
    with RawConnection(full) as connection:
        error_of = [connection.head(len(RED), X_Request_ID=f"{ID}-{i}") + RED for i in range(3)]
        connection.socket.sendall(b"".join(error_of) + b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n" + error_of[0])
        for i in range(3):
            check_rejection(connection.response(), request_id=f"{ID}-{i}")
        assert connection.response().json()["status"] == "alive"
        check_rejection(connection.response(), request_id=f"{ID}-0")


def test_a_rejection_needs_no_thread(tiny_bundle: SimpleNamespace) -> None:
    """Rejections wait neither for accepted requests nor for slow clients."""
    with (
        serve(tiny_bundle.path, max_in_flight=4, max_images=4, threads=5) as server,
        hold_requests(server, 4) as accepted,
        RawConnection(server) as idle,
    ):
        idle.socket.sendall(b"POST /predict HTTP/1.1\r\n")  # and nothing more
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(RawConnection(server)) for _ in range(50)]
            for connection in connections:
                connection.socket.sendall(connection.head(len(RED)) + RED)
            for connection in connections:
                check_rejection(connection.response())
            for response in accepted.responses():
                assert probabilities(response)
            for connection in connections:  # now there is capacity
                connection.socket.sendall(connection.head(len(RED)) + RED)
                assert connection.response().status == 200


# Accepted requests


def test_a_rejected_connection_is_served_once_there_is_capacity(shared_server: SharedServer) -> None:
    server = shared_server(max_in_flight=4, max_images=4)
    with hold_requests(server, 4) as accepted, RawConnection(server) as connection:
        connection.socket.sendall(connection.head(len(RED)) + RED)
        check_rejection(connection.response())
        for response in accepted.responses():
            expected = probabilities(response)
        for _ in range(3):
            connection.socket.sendall(connection.head(len(RED)) + RED)
            assert probabilities(connection.response()) == expected
        poll(lambda: in_flight(server) == 0)


@pytest.mark.parametrize("reset", [False, True])
def test_a_disconnected_client_occupies_no_slot(shared_server: SharedServer, reset: bool) -> None:
    """At half of the capacity. An incomplete request occupies no slot, and a complete one releases it."""
    server = shared_server(max_in_flight=4, max_images=4)
    with hold_requests(server, 2) as accepted:
        for _ in range(30):
            with RawConnection(server) as connection:
                connection.send_half()
                connection.close(reset=reset)
        assert in_flight(server) == 2
        for _ in range(2):
            with RawConnection(server) as connection:
                connection.socket.sendall(connection.head(len(RED)) + RED)
                poll(lambda: in_flight(server) == 3)
                connection.close(reset=True)
            accepted.release()  # a thread notices the disconnect when it decodes
            poll(lambda: in_flight(server) == 0)
            for connection in accepted.connections:
                assert probabilities(connection.response())
                connection.close()
            accepted.connections.clear()
            accepted.hold()
            accepted.send(2)
            poll(lambda: in_flight(server) == 2)
        accepted.send(2)
        poll(lambda: in_flight(server) == 4)
        check_rejection(server.post(RED, "image/png"))
        for response in accepted.responses():
            assert probabilities(response)
        poll(lambda: in_flight(server) == 0)


def test_a_stop_at_capacity_finishes_accepted_requests_only(tiny_bundle: SimpleNamespace) -> None:
    with (
        serve(tiny_bundle.path, max_in_flight=4, max_images=4) as server,
        hold_requests(server, 4) as accepted,
        RawConnection(server) as connection,
    ):
        connection.socket.sendall(connection.head(len(RED)) + RED)
        check_rejection(connection.response())
        os.kill(server.pid, signal.SIGTERM)
        assert connection.is_closed()
        for response in accepted.responses():
            assert probabilities(response)
        assert server.process.wait(RESPONSE_TIMEOUT_S) == 0


def test_rejections_are_counted(full: Server) -> None:
    before = full.metrics()
    with RawConnection(full) as connection:
        for length in (len(RED), 100_000):  # kept and closed
            connection.socket.sendall(connection.head(length) + bytes(length))
            check_rejection(connection.response())
    now = full.metrics()
    for name in ('http_problems_total{code="overloaded"}', 'http_requests_total{method="POST",route="/predict",status="503"}'):
        assert now[name] - before.get(name, 0) == 2
    assert now["classifier_in_flight_images"] == 4

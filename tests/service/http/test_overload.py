"""The service when more come than it can answer: who is told to come again, how, and what happens to those who were let in."""

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

from tests.helpers.raw_connection import HEAVY, RED, Line, held, inside, probabilities, told
from tests.helpers.server import ANSWER_S, Reply, Server, multipart, poll, serve

ID = "0123456789abcdef-is-given"


@pytest.fixture
def full(tiny_bundle: SimpleNamespace) -> Iterator[Server]:
    """A server that has room for four, and has four."""
    with serve(tiny_bundle.path, max_in_flight=4, max_images=4) as server, held(server, 4):
        yield server


def check_refusal(reply: Reply, *, request_id: str | None = None) -> None:
    assert (reply.status, reply.code) == (503, "overloaded"), reply.body
    assert 1 <= int(reply.headers["Retry-After"]) <= 60
    assert f"Retry in {reply.headers['Retry-After']} s." in reply.json()["detail"]
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.json()["request_id"] == reply.headers["X-Request-ID"]
    if request_id:
        assert reply.headers["X-Request-ID"] == request_id


def test_a_full_house_says_when_to_come_again_and_finishes_what_it_took(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, max_in_flight=4, max_images=4) as server:
        with held(server, 4) as accepted:
            for body, kind in ((RED, "image/png"), multipart(("file", "a.png", RED))):
                check_refusal(server.post(body, kind))
            assert server.get("/health/live").status == 200
            assert server.get("/health/ready").status == 200
            for reply in accepted.answers():
                assert probabilities(reply)
        poll(lambda: inside(server) == 0)
        assert probabilities(server.post(RED, "image/png"))
        assert server.metrics()['http_problems_total{code="overloaded"}'] == 2
        assert server.metrics()['http_requests_rejected_total{reason="at_capacity"}'] == 2


def test_who_is_refused_hears_of_it_whatever_the_size_of_the_photo(tiny_bundle: SimpleNamespace) -> None:
    """A refusal is sent before the body is read; a client that is still sending must find it nevertheless."""
    with serve(tiny_bundle.path, max_in_flight=1, max_images=1) as server, held(server, 1):
        for size in (10_000, 300_000, 3_000_000, 15_000_000):
            reply = told(partial(server.post, bytes(size), "image/png"))
            assert (reply.status, reply.code) == (503, "overloaded"), size


@pytest.mark.parametrize(
    ("path", "status", "length"),
    [("/predict", 503, 1_000), ("/predict", 503, 100_000), ("/predict", 413, 30_000_000), ("/nowhere", 404, 100_000)],
)
def test_an_answer_says_whether_another_request_may_follow(
    tiny_bundle: SimpleNamespace, path: str, status: int, length: int
) -> None:
    """What a client sends behind an answer on a connection that is being closed is lost: an application's next photo."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve(tiny_bundle.path, max_in_flight=1, max_images=1))
        if status == 503:
            stack.enter_context(held(server, 1))
        line = stack.enter_context(Line(server))
        line.socket.sendall(line.head(length, path=path) + bytes(min(length, 100_000)))
        reply = line.answer()
        assert reply.status == status
        if length < 65_536 or status == 404:  # of a body that is not read, so much is thrown away for the next request's sake
            assert reply.headers["Connection"] == "keep-alive"
            line.socket.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert line.answer().status == 200
        else:
            assert reply.headers["Connection"] == "close"
            assert line.is_closed()


def test_overloaded_it_goes_on_answering(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, max_in_flight=4, max_images=4) as server:

        def client(_: int) -> Counter[int]:
            seen: Counter[int] = Counter()
            for _ in range(15):
                reply = server.post(HEAVY, "image/png")
                seen[reply.status] += 1
                assert reply.status == 200 or (reply.code == "overloaded" and int(reply.headers["Retry-After"]) >= 1)
            return seen

        with ThreadPoolExecutor(12) as clients:
            asked = [clients.submit(client, i) for i in range(12)]
            while not all(future.done() for future in asked):
                assert server.get("/health/ready").status == 200
            seen = sum((future.result() for future in asked), Counter())
        assert seen.keys() == {200, 503}
        poll(lambda: inside(server) == 0)
        metrics = server.metrics()
        for status, count in seen.items():
            assert metrics[f'http_requests_total{{method="POST",route="/predict",status="{status}"}}'] == count


# What one connection hears


def test_refusals_on_one_connection_have_their_own_ids(full: Server) -> None:
    with Line(full) as line:
        seen = set()
        for given in (None, ID, None, "short", "x" * 64, "y" * 65, "not an id, as it has spaces", None):
            line.socket.sendall(line.head(len(RED), **({"X_Request_ID": given} if given else {})) + RED)
            reply = line.answer()
            check_refusal(reply, request_id=given if given in (ID, "short", "x" * 64) else None)
            seen.add(reply.headers["X-Request-ID"])
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
    ids=["plain", "other case", "other spaces", "close", "from a page", "HTTP/1.0", "absolute", "long"],
)
def test_however_it_is_asked_the_same_is_said(full: Server, head: bytes) -> None:
    with Line(full) as line:
        line.socket.sendall(head % len(RED) + RED)
        reply = line.answer()
        check_refusal(reply)
        plain = full.post(RED, "image/png")
        own = {"Date", "X-Request-ID", "Connection"}
        assert {**reply.headers} | dict.fromkeys(own) == {**plain.headers} | dict.fromkeys(own)
        ends = b"close" in head.lower() or b"HTTP/1.0" in head
        assert reply.headers["Connection"] == ("close" if ends else "keep-alive")
        if ends:
            assert line.is_closed()
        else:
            line.socket.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert line.answer().status == 200


def test_chunks_are_refused_as_well(full: Server) -> None:
    with Line(full) as line:
        line.socket.sendall(line.head("chunked") + b"3\r\nabc\r\n0\r\n\r\n")
        check_refusal(line.answer())


def test_who_waits_to_be_asked_for_the_body_is_refused_before(full: Server) -> None:
    with Line(full) as line:
        line.socket.sendall(line.head(len(RED), Expect="100-continue"))
        check_refusal(line.answer())


@pytest.mark.parametrize("twice", [(b"5", b"5"), (b"5", b"0"), (b"0", b"5")])
def test_two_lengths_are_none(full: Server, twice: tuple[bytes, bytes]) -> None:
    with Line(full) as line:
        line.socket.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %b\r\ncontent-length: %b\r\n\r\nGET /" % twice
        )
        assert line.answer().status == 400
        assert line.is_closed()


def test_a_refused_body_that_comes_late_is_no_request(full: Server) -> None:
    """A head is refused before its body is there; what comes of it then must not be taken for what is asked next."""
    body = b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100
    with Line(full) as line:
        for pieces in (1, 2, 30):
            line.socket.sendall(line.head(len(body)))
            check_refusal(line.answer())
            for i in range(pieces):
                line.socket.sendall(body[len(body) * i // pieces : len(body) * (i + 1) // pieces])
            line.socket.sendall(line.head(len(body), X_Request_ID=ID) + body)
            check_refusal(line.answer(), request_id=ID)


def test_requests_in_one_go_are_refused_and_answered_in_their_order(full: Server) -> None:
    with Line(full) as line:
        refused = [line.head(len(RED), X_Request_ID=f"{ID}-{i}") + RED for i in range(3)]
        line.socket.sendall(b"".join(refused) + b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n" + refused[0])
        for i in range(3):
            check_refusal(line.answer(), request_id=f"{ID}-{i}")
        assert line.answer().json()["status"] == "alive"
        check_refusal(line.answer(), request_id=f"{ID}-0")


def test_a_refusal_needs_no_thread(tiny_bundle: SimpleNamespace) -> None:
    """Those who are refused are many, and wait neither for those who are answered nor for those who trickle."""
    with (
        serve(tiny_bundle.path, max_in_flight=4, max_images=4, threads=5) as server,
        held(server, 4) as accepted,
        Line(server) as idle,
    ):
        idle.socket.sendall(b"POST /predict HTTP/1.1\r\n")  # and never more
        with contextlib.ExitStack() as open_lines:
            lines = [open_lines.enter_context(Line(server)) for _ in range(50)]
            for line in lines:
                line.socket.sendall(line.head(len(RED)) + RED)
            for line in lines:
                check_refusal(line.answer())
            for reply in accepted.answers():
                assert probabilities(reply)
            for line in lines:  # and so the house has room
                line.socket.sendall(line.head(len(RED)) + RED)
                assert line.answer().status == 200


# Who was let in


def test_a_connection_that_was_refused_is_answered_when_there_is_room(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, max_in_flight=4, max_images=4) as server, held(server, 4) as accepted, Line(server) as line:
        line.socket.sendall(line.head(len(RED)) + RED)
        check_refusal(line.answer())
        for reply in accepted.answers():
            expected = probabilities(reply)
        for _ in range(3):
            line.socket.sendall(line.head(len(RED)) + RED)
            assert probabilities(line.answer()) == expected
        poll(lambda: inside(server) == 0)


@pytest.mark.parametrize("rudely", [False, True])
def test_who_leaves_takes_no_place_along(tiny_bundle: SimpleNamespace, rudely: bool) -> None:
    """Half of the house is full. A request that is not complete takes no place, and one that is gives it back."""
    with serve(tiny_bundle.path, max_in_flight=4, max_images=4) as server, held(server, 2) as accepted:
        for _ in range(30):
            with Line(server) as line:
                line.begin()
                line.close(rudely=rudely)
        assert inside(server) == 2
        for _ in range(2):
            with Line(server) as line:
                line.socket.sendall(line.head(len(RED)) + RED)
                poll(lambda: inside(server) == 3)
                line.close(rudely=True)
            accepted.release()  # a thread notices it when it decodes
            poll(lambda: inside(server) == 0)
            for line in accepted.lines:
                assert probabilities(line.answer())
                line.close()
            accepted.lines.clear()
            accepted.hold()
            accepted.send(2)
            poll(lambda: inside(server) == 2)
        accepted.send(2)
        poll(lambda: inside(server) == 4)
        check_refusal(server.post(RED, "image/png"))
        for reply in accepted.answers():
            assert probabilities(reply)
        poll(lambda: inside(server) == 0)


def test_a_stop_of_a_full_house_answers_who_is_in_it_and_ends_who_is_not(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, max_in_flight=4, max_images=4) as server, held(server, 4) as accepted, Line(server) as line:
        line.socket.sendall(line.head(len(RED)) + RED)
        check_refusal(line.answer())
        os.kill(server.pid, signal.SIGTERM)
        assert line.is_closed()
        for reply in accepted.answers():
            assert probabilities(reply)
        assert server.process.wait(ANSWER_S) == 0


def test_refusals_are_counted(full: Server) -> None:
    before = full.metrics()
    with Line(full) as line:
        for length in (len(RED), 100_000):  # kept, and closed
            line.socket.sendall(line.head(length) + bytes(length))
            check_refusal(line.answer())
    now = full.metrics()
    for name in ('http_problems_total{code="overloaded"}', 'http_requests_total{method="POST",route="/predict",status="503"}'):
        assert now[name] - before.get(name, 0) == 2
    assert now["classifier_in_flight_images"] == 4

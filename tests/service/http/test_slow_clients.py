"""The service under gunicorn: request bodies, slow and disconnecting clients, stops, killed workers, metrics and logs."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import SharedServer
from tests.helpers.raw_connection import (
    BOMB,
    HEAVY,
    RED,
    RawConnection,
    half_sent_requests,
    image_of,
    in_flight,
    probabilities,
    send_with_retry,
)
from tests.helpers.server import RESPONSE_TIMEOUT_S, Response, Server, multipart, poll, rss_mb, serve
from tests.helpers.tiny_network import COLORS

pytestmark = pytest.mark.slow

LABELS = ("blue", "red", "green")


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> Server:
    return shared_server()


# Start


def test_a_server_is_alive_at_once_and_ready_with_its_model(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, ready=False) as server:
        assert server.get("/health/live").status == 200
        seen = []

        def ready() -> bool:
            response = server.get("/health/ready")
            seen.append((response.status, response.code))
            return response.status == 200

        poll(ready)
        assert set(seen[:-1]) <= {(503, "not_ready")}
        assert probabilities(server.post(RED, "image/png"))
        poll(lambda: "ready" in [line["message"] for line in server.log()])  # logged shortly after it is ready
        assert server.metrics()["classifier_ready_workers"] == 1


# Request bodies


def test_chunked_bodies_are_joined(server: Server) -> None:
    expected = probabilities(server.post(RED, "image/png"))
    assert probabilities(server.post([RED[:10], RED[10:11], RED[11:]], "image/png")) == expected
    body, kind = multipart(("file", "a.png", RED))
    assert probabilities(server.post([body[i : i + 7] for i in range(0, len(body), 7)], kind)) == expected
    assert server.post([b""], "image/png").code == "no_image"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_a_body_above_the_limit_gets_413(server: Server, chunked: bool) -> None:
    body = bytes(24 << 20)

    def send() -> Response:
        return server.post((body[i : i + 100_000] for i in range(0, len(body), 100_000)) if chunked else body, "image/png")

    response = send_with_retry(send)
    assert (response.status, response.code) == (413, "body_too_large")
    size = "" if chunked else "24 MB, "
    assert response.json()["detail"] == f"Upload too large: {size}the limit is 20 MB. Send fewer or smaller images."


@pytest.mark.parametrize(
    "body",
    [b"zz\r\n", b"-5\r\nabc", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"3\r\nabc\r\n0\r\nnonsense\r\n\r\n", b"5;" + b"x" * 20_000],
)
def test_malformed_chunks_are_rejected_and_the_connection_closed(server: Server, body: bytes) -> None:
    with RawConnection(server) as connection:
        connection.socket.sendall(connection.head("chunked") + body)
        response = connection.response()
        assert (response.status, response.code) == (400, "bad_request")
        assert connection.is_closed()


def test_pipelined_requests_are_served_in_order(server: Server) -> None:
    photos = [image_of(COLORS[i % 3], (40 + i, 50)) for i in range(30)]
    alone = [probabilities(server.post(photo, "image/png")) for photo in photos]
    assert all(a != b for a, b in pairwise(alone))
    with RawConnection(server) as connection:
        requests = [connection.head(len(photo), X_Request_ID=f"n{i}") + photo for i, photo in enumerate(photos)]
        threading.Thread(target=connection.socket.sendall, args=(b"".join(requests),)).start()
        for i, expected in enumerate(alone):
            response = connection.response()
            assert response.headers["X-Request-ID"] == f"n{i}"
            assert probabilities(response) == expected


def test_concurrent_clients_get_their_own_results_on_kept_connections(server: Server) -> None:
    photos = [image_of(((i * 37) % 256, (i * 91) % 256, (i * 13) % 256)) for i in range(40)]
    expected = [probabilities(server.post(photo, "image/png")) for photo in photos]

    def client(number: int) -> list[bool]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=RESPONSE_TIMEOUT_S)
        matches = []
        for i in random.Random(number).sample(range(40), 40):
            connection.request("POST", "/predict", photos[i], {"Content-Type": "image/png", "X-Request-ID": f"c{number}-{i}"})
            answer = connection.getresponse()
            response = Response(answer.status, answer.headers, answer.read())
            matches.append(response.headers["X-Request-ID"] == f"c{number}-{i}" and probabilities(response) == expected[i])
        connection.close()
        return matches

    with ThreadPoolExecutor(8) as clients:
        assert all(all(matches) for matches in clients.map(client, range(8)))


# Slow and disconnecting clients


def test_a_missing_body_times_out(shared_server: SharedServer) -> None:
    server = shared_server(body_timeout_s=0.4)
    with RawConnection(server) as connection:
        connection.send_half()
        response = connection.response()
        assert (response.status, response.code) == (408, "body_timeout")
        assert "within 0.4 s" in response.json()["detail"]
        assert connection.is_closed()
    assert in_flight(server) == 0


@pytest.mark.parametrize("path", ["/gallery/review", "/gallery/key"])
def test_a_missing_form_times_out(shared_server: SharedServer, path: str) -> None:
    with RawConnection(shared_server(body_timeout_s=0.4)) as connection:
        connection.socket.sendall(connection.head(100, path=path, Content_Type="application/x-www-form-urlencoded") + b"photo=")
        response = connection.response()
        assert response.status == 408
        assert b"within 0.4 s" in response.body
        assert connection.is_closed()


def test_a_form_above_the_limit_is_rejected(server: Server) -> None:
    form = b"note=" + b"x" * 70_000
    response = send_with_retry(lambda: server.post(form, "application/x-www-form-urlencoded", path="/gallery/review"))
    assert response.status == 413
    assert "Upload too large: 68.4 KB, the limit is 64 KB. Shorten the text." in response.body.decode()


@pytest.mark.parametrize("length", [1_000_000, "chunked"])
def test_a_trickling_body_times_out(shared_server: SharedServer, length: int | str) -> None:
    """A byte now and then would reset a timeout of the socket."""
    with RawConnection(shared_server(body_timeout_s=0.4)) as connection:
        connection.socket.sendall(connection.head(length))
        done = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not done.wait(0.02):
                    connection.socket.sendall(b"x" if length != "chunked" else b"1\r\nx\r\n")

        sender = threading.Thread(target=trickle)
        sender.start()
        try:
            assert connection.response().code == "body_timeout"
        finally:
            done.set()
            sender.join()


def test_clients_that_do_not_close_do_not_delay_others(server: Server) -> None:
    """gunicorn's own worker waits 2 s for a client to close, in the thread that accepts."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(RawConnection(server)) for _ in range(60)]
        began = time.monotonic()
        for connection in connections:
            connection.socket.sendall(connection.head(30_000_000, Connection="close"))
        for connection in connections:
            assert connection.response().status == 413
        assert server.get("/health/live").status == 200
        assert probabilities(server.post(RED, "image/png"))
        assert time.monotonic() - began < 60  # one after the other, they would take 120 s


@pytest.mark.parametrize("reset", [False, True])
def test_a_disconnect_within_a_body_releases_everything(server: Server, reset: bool) -> None:
    with half_sent_requests(server, 5) as started:
        for connection, _ in started:
            connection.close(reset=reset)
        poll(lambda: in_flight(server) == 0)
    assert probabilities(server.post(RED, "image/png"))


def test_a_disconnect_before_the_response_releases_everything(server: Server) -> None:
    for _ in range(5):
        with RawConnection(server) as connection:
            connection.socket.sendall(connection.head(len(HEAVY)) + HEAVY)
    poll(lambda: in_flight(server) == 0)
    assert probabilities(server.post(RED, "image/png"))


def test_a_request_after_its_deadline_fails(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, deadline_ms=100) as server:
        with RawConnection(server) as connection:
            rest = connection.send_half_after_continue(HEAVY)
            time.sleep(0.1)  # now the deadline has passed
            connection.socket.sendall(rest)
            response = connection.response()
        assert (response.status, response.code) == (504, "deadline_exceeded")
        assert "within 100 ms" in response.json()["detail"]
        poll(lambda: in_flight(server) == 0)
        poll(lambda: server.post(RED, "image/png").status == 200)  # a busy machine may need several attempts


# Stops and killed workers


def test_a_stop_finishes_accepted_requests(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path) as server:
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=RESPONSE_TIMEOUT_S)
        kept.request("GET", "/health/live")
        assert kept.getresponse().read()
        with half_sent_requests(server, 6) as started:
            os.kill(server.pid, signal.SIGTERM)
            poll(lambda: any("signal: term" in line["message"] for line in server.log()))
            for connection, rest in started[:3]:
                connection.socket.sendall(rest)
            for connection, _ in started[:3]:
                response = connection.response()
                assert probabilities(response)
            assert server.process.poll() is None  # waits for the others
            for connection, rest in started[3:]:
                connection.socket.sendall(rest)
                response = connection.response()
                assert probabilities(response)
                assert connection.is_closed()
            assert kept.sock is not None
            assert kept.sock.recv(1) == b""  # closed, not reset
            kept.close()
        assert server.process.wait(RESPONSE_TIMEOUT_S) == 0
        assert all(line["level"] == "INFO" for line in server.log())


def test_a_killed_worker_is_replaced_and_counters_persist(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path) as server:
        for _ in range(5):
            probabilities(server.post(RED, "image/png"))
        (worker,) = server.workers()
        with half_sent_requests(server, 2) as started:
            os.kill(worker, signal.SIGKILL)
            for connection, _ in started:
                with contextlib.suppress(ConnectionResetError):
                    assert connection.is_closed()
        poll(lambda: server.workers() not in ([], [worker]))
        poll(lambda: server.get("/health/ready").status == 200)
        probabilities(server.post(RED, "image/png"))
        metrics = server.metrics()
        assert metrics['http_requests_total{method="POST",route="/predict",status="200"}'] == 6
        assert metrics['classifier_predictions_total{label="red"}'] == 6
        assert (metrics["classifier_ready_workers"], metrics["classifier_in_flight_images"]) == (1, 0)
        assert server.process.poll() is None


def test_workers_share_requests_and_sum_their_metrics(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, web_concurrency=2) as server:
        poll(lambda: server.metrics()["classifier_ready_workers"] == 2)
        workers, sent = set(server.workers()), 0
        assert len(workers) == 2

        def both() -> bool:
            nonlocal sent
            with ThreadPoolExecutor(8) as clients:
                answers = list(clients.map(lambda _: server.post(RED, "image/png"), range(16)))
            sent += len(answers)
            assert all(answer.status == 200 for answer in answers)
            return {line["process"] for line in server.log() if line.get("path") == "/predict"} == workers

        poll(both)
        for _ in range(4):  # each worker reports both
            assert server.metrics()['http_requests_total{method="POST",route="/predict",status="200"}'] == sent
        assert server.metrics()['classifier_predictions_total{label="red"}'] == sent


# Metrics and logs


def test_metrics_match_the_requests(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path) as server:
        for i, label in enumerate(LABELS):
            for photo in sorted((tiny_bundle.photos / label).iterdir())[: i + 2]:
                assert server.post(photo.read_bytes()).json()["predictions"][0]["label"] == label
        assert server.post(*multipart(("file", "a", RED), ("file", "b", RED), ("file", "c", b"no"))).status == 200
        assert server.post(b"no").status == 415
        assert server.get("/nowhere").status == 404
        assert server.get("/predict").status == 405
        decoded = 'classifier_stage_duration_seconds_count{stage="decode"}'
        metrics = poll(lambda: (latest := server.metrics())[decoded] >= 13 and latest)  # counted while the response is sent
        for name, value in {
            'http_requests_total{method="POST",route="/predict",status="200"}': 10,
            'http_requests_total{method="POST",route="/predict",status="415"}': 1,
            'http_requests_total{method="GET",route="none",status="404"}': 1,
            'http_request_duration_seconds_count{route="/predict"}': 11,
            'http_problems_total{code="not_an_image"}': 2,
            'http_problems_total{code="not_found"}': 1,
            'http_problems_total{code="method_not_allowed"}': 1,
            'classifier_predictions_total{label="blue"}': 2,
            'classifier_predictions_total{label="red"}': 3 + 2,
            'classifier_predictions_total{label="green"}': 4,
            "classifier_prediction_confidence_count": 11,
            "classifier_batch_size_sum": 11,
            decoded: 13,
            'classifier_stage_duration_seconds_count{stage="batch_queue"}': 11,
            "classifier_in_flight_images": 0,
            "classifier_ready_workers": 1,
        }.items():
            assert metrics[name] == value, name
        assert 1 <= metrics['classifier_stage_duration_seconds_count{stage="inference"}'] <= 11
        model = server.get("/models").json()["models"][0]
        labels = f'name="{model["name"]}",precision="{model["precision"]}",version="{model["version"]}"'
        assert metrics[f"classifier_model_info{{{labels}}}"] == 1


def test_every_log_line_is_json_with_the_request_id(server: Server) -> None:
    server.post(RED, "image/png", headers={"X-Request-ID": "find-this-request"})
    (line,) = poll(lambda: [line for line in server.log() if line.get("request_id") == "find-this-request"])
    assert line.keys() >= {
        "time",
        "level",
        "logger",
        "message",
        "process",
        "method",
        "path",
        "status",
        "duration_ms",
        "client",
        "key_name",
    }
    assert (line["status"], line["process"]) == (200, server.workers()[0])


# Mixed requests


def bad_requests(rng: random.Random) -> Iterator[tuple[bytes, str]]:
    """Yield invalid bodies without end."""
    while True:
        yield rng.randbytes(rng.randrange(3000)), "image/jpeg"
        yield RED[: rng.randrange(1, len(RED) - 20)], "image/png"
        yield RED[:8] + rng.randbytes(200), "image/png"
        yield BOMB, "image/png"
        yield rng.randbytes(100), "multipart/form-data; boundary=x"
        yield (
            json.dumps({"instances": [{"b64": base64.b64encode(rng.randbytes(20)).decode()[1:]}] * 20}).encode(),
            "application/json",
        )
        yield b'{"image": "' + rng.randbytes(20), "application/json"
        yield b"text", "text/plain"


def chaos(server: Server, seed: int, requests: int) -> Counter[Any]:
    """Send valid images, invalid ones and disconnects. Returns the number of each response."""
    rng, seen = random.Random(seed), Counter[Any]()
    bad = bad_requests(rng)
    for _ in range(requests):
        kind = rng.random()
        if kind < 0.6:
            seen["good", server.post(RED, "image/png").status] += 1
        elif kind < 0.9:
            seen["bad", server.post(*next(bad)).status] += 1
        else:
            with RawConnection(server) as connection:
                whole = connection.head(len(RED)) + RED
                connection.socket.sendall(whole[: rng.randrange(1, len(whole) + 1)])
            seen["disconnected"] += 1
    return seen


def test_rejected_images_are_freed_at_once(tiny_bundle: SimpleNamespace) -> None:
    """An exception references its frames, and they the image, in a cycle that only garbage collection frees."""
    junk = b"\xff\xd8\xff" + random.Random(0).randbytes(1 << 20) * 15
    with serve(tiny_bundle.path) as server:
        (worker,) = server.workers()

        def reject() -> float:
            for _ in range(10):
                assert server.post(junk).status == 422
                assert server.post(*multipart(("file", "a", junk), ("file", "b", b"no"))).status == 200
                assert server.post(b"--y\r\n" + junk, "multipart/form-data; boundary=x").code == "bad_form"
            return rss_mb(worker)

        before_mb = reject()
        assert max(reject() for _ in range(2)) - before_mb < 100  # each round sent 450 MB


def test_thousands_of_mixed_requests_leave_the_server_unchanged(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path) as server:
        (worker,) = server.workers()
        expected = probabilities(server.post(RED, "image/png"))
        with ThreadPoolExecutor(6) as clients:
            clients.submit(lambda: None)

            def storm(seed: int, requests: int) -> Counter[Any]:
                parts = clients.map(lambda i: chaos(server, seed + i, requests // 6), range(6))
                return sum(parts, Counter[Any]())

            storm(0, 900)
            before_mb = rss_mb(worker)
            seen = storm(100, 2100)
        poll(lambda: in_flight(server) == 0)
        assert probabilities(server.post(RED, "image/png")) == expected
        assert server.workers() == [worker]
        assert {status for status in seen if status != "disconnected" and status[1] >= 500} <= {("good", 503), ("bad", 503)}
        assert {status[1] for status in seen if status[0] == "good"} <= {200, 503}
        assert {status[1] for status in seen if status[0] == "bad"} <= {200, 400, 413, 415, 422, 503}
        assert seen["good", 200] > 1000
        assert rss_mb(worker) - before_mb < 40
        assert [line for line in server.log() if line["level"] in ("ERROR", "CRITICAL")] == []

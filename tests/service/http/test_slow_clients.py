"""The service under gunicorn: slow, rude and too many clients, stops and deaths, and what /metrics says of it all."""

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

from tests.helpers.raw_connection import BOMB, HEAVY, RED, Line, halves, inside, photo_of, probabilities, told
from tests.helpers.server import ANSWER_S, Reply, Server, multipart, poll, rss_mb, serve
from tests.helpers.tiny_network import COLORS

LABELS = ("blue", "red", "green")


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace) -> Iterator[Server]:
    """One for the tests that leave it as it was."""
    with serve(tiny_bundle.path) as server:
        yield server


# It starts


def test_it_is_alive_at_once_and_ready_when_the_model_is(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, ready=False) as server:
        assert server.get("/health/live").status == 200
        seen = []

        def ready() -> bool:
            reply = server.get("/health/ready")
            seen.append((reply.status, reply.code))
            return reply.status == 200

        poll(ready)
        assert set(seen[:-1]) <= {(503, "not_ready")}
        assert probabilities(server.post(RED, "image/png"))
        poll(lambda: "ready" in [line["message"] for line in server.log()])  # it serves a moment before it says so
        assert server.metrics()["classifier_ready_workers"] == 1


# What it is sent


def test_chunks_are_put_together(server: Server) -> None:
    wanted = probabilities(server.post(RED, "image/png"))
    assert probabilities(server.post([RED[:10], RED[10:11], RED[11:]], "image/png")) == wanted
    body, kind = multipart(("file", "a.png", RED))
    assert probabilities(server.post([body[i : i + 7] for i in range(0, len(body), 7)], kind)) == wanted
    assert server.post([b""], "image/png").code == "no_image"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_told_so_even_to_who_sends_all_of_it(server: Server, chunked: bool) -> None:
    body = bytes(24 << 20)

    def send() -> Reply:
        return server.post((body[i : i + 100_000] for i in range(0, len(body), 100_000)) if chunked else body, "image/png")

    reply = told(send)
    assert (reply.status, reply.code) == (413, "body_too_large")
    size = "" if chunked else "24 MB, "
    assert reply.json()["detail"] == f"Upload too large: {size}the limit is 20 MB. Send fewer or smaller images."


@pytest.mark.parametrize(
    "body",
    [b"zz\r\n", b"-5\r\nabc", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"3\r\nabc\r\n0\r\nnonsense\r\n\r\n", b"5;" + b"x" * 20_000],
)
def test_chunks_that_are_none_are_refused_and_the_connection_ends(server: Server, body: bytes) -> None:
    with Line(server) as line:
        line.socket.sendall(line.head("chunked") + body)
        reply = line.answer()
        assert (reply.status, reply.code) == (400, "bad_request")
        assert line.is_closed()


def test_requests_in_one_go_are_answered_in_their_order(server: Server) -> None:
    photos = [photo_of(COLORS[i % 3], (40 + i, 50)) for i in range(30)]
    alone = [probabilities(server.post(photo, "image/png")) for photo in photos]
    assert all(a != b for a, b in pairwise(alone))
    with Line(server) as line:
        requests = [line.head(len(photo), X_Request_ID=f"n{i}") + photo for i, photo in enumerate(photos)]
        threading.Thread(target=line.socket.sendall, args=(b"".join(requests),)).start()
        for i, wanted in enumerate(alone):
            reply = line.answer()
            assert reply.headers["X-Request-ID"] == f"n{i}"
            assert probabilities(reply) == wanted


def test_many_clients_get_their_own_answers_on_connections_that_they_keep(server: Server) -> None:
    photos = [photo_of(((i * 37) % 256, (i * 91) % 256, (i * 13) % 256)) for i in range(40)]
    wanted = [probabilities(server.post(photo, "image/png")) for photo in photos]

    def client(number: int) -> list[bool]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWER_S)
        right = []
        for i in random.Random(number).sample(range(40), 40):
            connection.request("POST", "/predict", photos[i], {"Content-Type": "image/png", "X-Request-ID": f"c{number}-{i}"})
            answer = connection.getresponse()
            reply = Reply(answer.status, answer.headers, answer.read())
            right.append(reply.headers["X-Request-ID"] == f"c{number}-{i}" and probabilities(reply) == wanted[i])
        connection.close()
        return right

    with ThreadPoolExecutor(8) as clients:
        assert all(all(right) for right in clients.map(client, range(8)))


# Clients that are slow, or leave


def test_a_body_that_stays_out_is_ended(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, body_timeout_s=0.4) as server:
        with Line(server) as line:
            line.begin()
            reply = line.answer()
            assert (reply.status, reply.code) == (408, "body_timeout")
            assert "within 0.4 s" in reply.json()["detail"]
            assert line.is_closed()
        assert inside(server) == 0


@pytest.mark.parametrize("path", ["/gallery/review", "/gallery/key"])
def test_a_form_that_stays_out_is_ended_too(tiny_bundle: SimpleNamespace, path: str) -> None:
    with serve(tiny_bundle.path, body_timeout_s=0.4) as server, Line(server) as line:
        line.socket.sendall(line.head(100, path=path, Content_Type="application/x-www-form-urlencoded") + b"photo=")
        reply = line.answer()
        assert reply.status == 408
        assert b"within 0.4 s" in reply.body
        assert line.is_closed()


def test_a_form_of_any_size_is_not(server: Server) -> None:
    form = b"note=" + b"x" * 70_000
    reply = told(lambda: server.post(form, "application/x-www-form-urlencoded", path="/gallery/review"))
    assert reply.status == 413
    assert "Upload too large: 68.4 KB, the limit is 64 KB. Shorten the text." in reply.body.decode()


@pytest.mark.parametrize("length", [1_000_000, "chunked"])
def test_a_body_that_trickles_is_ended_as_well(tiny_bundle: SimpleNamespace, length: int | str) -> None:
    """One byte now and then would keep a socket's own time-out from ever being reached."""
    with serve(tiny_bundle.path, body_timeout_s=0.4) as server, Line(server) as line:
        line.socket.sendall(line.head(length))
        done = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not done.wait(0.02):
                    line.socket.sendall(b"x" if length != "chunked" else b"1\r\nx\r\n")

        sender = threading.Thread(target=trickle)
        sender.start()
        try:
            assert line.answer().code == "body_timeout"
        finally:
            done.set()
            sender.join()


def test_those_who_do_not_go_when_told_hold_nobody_up(tiny_bundle: SimpleNamespace) -> None:
    """gunicorn waits 2 s for a client to close, in the thread that accepts: sixty in a row would be two minutes' silence."""
    with serve(tiny_bundle.path) as server, contextlib.ExitStack() as open_lines:
        lines = [open_lines.enter_context(Line(server)) for _ in range(60)]
        began = time.monotonic()
        for line in lines:
            line.socket.sendall(line.head(30_000_000, Connection="close"))
        for line in lines:
            assert line.answer().status == 413
        assert server.get("/health/live").status == 200
        assert probabilities(server.post(RED, "image/png"))
        assert time.monotonic() - began < 60  # a second or two; one after the other, they would take 120


@pytest.mark.parametrize("rudely", [False, True])
def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind(server: Server, rudely: bool) -> None:
    with halves(server, 5) as begun:
        for line, _ in begun:
            line.close(rudely=rudely)
        poll(lambda: inside(server) == 0)
    assert probabilities(server.post(RED, "image/png"))


def test_a_client_that_leaves_before_its_answer_leaves_nothing_behind(server: Server) -> None:
    for _ in range(5):
        with Line(server) as line:
            line.socket.sendall(line.head(len(HEAVY)) + HEAVY)
    poll(lambda: inside(server) == 0)
    assert probabilities(server.post(RED, "image/png"))


def test_an_answer_that_comes_too_late_is_none(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path, deadline_ms=100) as server:
        with Line(server) as line:
            rest = line.begin_when_read(HEAVY)
            time.sleep(0.1)  # from here on the deadline is over for certain
            line.socket.sendall(rest)
            reply = line.answer()
        assert (reply.status, reply.code) == (504, "deadline_exceeded")
        assert "within 100 ms" in reply.json()["detail"]
        poll(lambda: inside(server) == 0)
        poll(lambda: server.post(RED, "image/png").status == 200)  # a busy machine may need more than 100 ms for one or two


# The end


def test_a_stop_answers_all_that_was_accepted(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path) as server:
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWER_S)
        kept.request("GET", "/health/live")
        assert kept.getresponse().read()
        with halves(server, 6) as begun:
            os.kill(server.pid, signal.SIGTERM)
            poll(lambda: any("signal: term" in line["message"] for line in server.log()))
            for line, rest in begun[:3]:
                line.socket.sendall(rest)
            for line, _ in begun[:3]:
                reply = line.answer()
                assert probabilities(reply)
            assert server.process.poll() is None  # it waits for the others
            for line, rest in begun[3:]:
                line.socket.sendall(rest)
                reply = line.answer()
                assert probabilities(reply)
                assert line.is_closed()
            assert kept.sock is not None
            assert kept.sock.recv(1) == b""  # ended, not reset
            kept.close()
        assert server.process.wait(ANSWER_S) == 0
        assert all(line["level"] == "INFO" for line in server.log())


def test_a_worker_that_dies_is_replaced_and_nothing_is_forgotten(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path) as server:
        for _ in range(5):
            probabilities(server.post(RED, "image/png"))
        (worker,) = server.workers()
        with halves(server, 2) as begun:
            os.kill(worker, signal.SIGKILL)
            for line, _ in begun:
                with contextlib.suppress(ConnectionResetError):
                    assert line.is_closed()
        poll(lambda: server.workers() not in ([], [worker]))
        poll(lambda: server.get("/health/ready").status == 200)
        probabilities(server.post(RED, "image/png"))
        metrics = server.metrics()
        assert metrics['http_requests_total{method="POST",route="/predict",status="200"}'] == 6
        assert metrics['classifier_predictions_total{label="red"}'] == 6
        assert (metrics["classifier_ready_workers"], metrics["classifier_in_flight_images"]) == (1, 0)
        assert server.process.poll() is None


def test_several_workers_share_the_work_and_sum_their_measures(tiny_bundle: SimpleNamespace) -> None:
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
        for _ in range(4):  # whichever answers, it speaks for both
            assert server.metrics()['http_requests_total{method="POST",route="/predict",status="200"}'] == sent
        assert server.metrics()['classifier_predictions_total{label="red"}'] == sent


# What it says of itself


def test_its_measures_are_those_of_what_was_sent(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path) as server:
        for i, label in enumerate(LABELS):
            for photo in sorted((tiny_bundle.photos / label).iterdir())[: i + 2]:
                assert server.post(photo.read_bytes()).json()["predictions"][0]["label"] == label
        assert server.post(*multipart(("file", "a", RED), ("file", "b", RED), ("file", "c", b"no"))).status == 200
        assert server.post(b"no").status == 415
        assert server.get("/nowhere").status == 404
        assert server.get("/predict").status == 405
        decoded = 'classifier_stage_duration_seconds_count{stage="decode"}'
        metrics = poll(lambda: (said := server.metrics())[decoded] >= 13 and said)  # counted while the answer is under way
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


def test_every_line_of_the_log_is_json_and_has_the_requests_id(server: Server) -> None:
    server.post(RED, "image/png", headers={"X-Request-ID": "look-for-me"})
    (line,) = poll(lambda: [line for line in server.log() if line.get("request_id") == "look-for-me"])
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


# Everything at once


def bad_requests(rng: random.Random) -> Iterator[tuple[bytes, str]]:
    """Bodies that deserve a refusal, without end."""
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
    """Good photos, bad ones, and hang-ups, one third each but for the first; gives what was answered."""
    rng, seen = random.Random(seed), Counter[Any]()
    bad = bad_requests(rng)
    for _ in range(requests):
        kind = rng.random()
        if kind < 0.6:
            seen["good", server.post(RED, "image/png").status] += 1
        elif kind < 0.9:
            seen["bad", server.post(*next(bad)).status] += 1
        else:
            with Line(server) as line:
                whole = line.head(len(RED)) + RED
                line.socket.sendall(whole[: rng.randrange(1, len(whole) + 1)])
            seen["left"] += 1
    return seen


def test_refused_photos_are_forgotten_at_once(tiny_bundle: SimpleNamespace) -> None:
    """An error holds the frames that it came through, and they the photo: in a cycle, until somebody collects it."""
    junk = b"\xff\xd8\xff" + random.Random(0).randbytes(1 << 20) * 15
    with serve(tiny_bundle.path) as server:
        (worker,) = server.workers()

        def refuse() -> float:
            for _ in range(10):
                assert server.post(junk).status == 422
                assert server.post(*multipart(("file", "a", junk), ("file", "b", b"no"))).status == 200
                assert server.post(b"--y\r\n" + junk, "multipart/form-data; boundary=x").code == "bad_form"
            return rss_mb(worker)

        before_mb = refuse()
        assert max(refuse() for _ in range(2)) - before_mb < 100  # each round sent 450 MB


def test_after_thousands_of_requests_of_every_kind_it_is_as_it_was(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path) as server:
        (worker,) = server.workers()
        wanted = probabilities(server.post(RED, "image/png"))
        with ThreadPoolExecutor(6) as clients:
            clients.submit(lambda: None)

            def storm(seed: int, requests: int) -> Counter[Any]:
                parts = clients.map(lambda i: chaos(server, seed + i, requests // 6), range(6))
                return sum(parts, Counter[Any]())

            storm(0, 900)
            before_mb = rss_mb(worker)
            seen = storm(100, 2100)
        poll(lambda: inside(server) == 0)
        assert probabilities(server.post(RED, "image/png")) == wanted
        assert server.workers() == [worker]
        assert {status for status in seen if status != "left" and status[1] >= 500} <= {("good", 503), ("bad", 503)}
        assert {status[1] for status in seen if status[0] == "good"} <= {200, 503}
        assert {status[1] for status in seen if status[0] == "bad"} <= {200, 400, 413, 415, 422, 503}
        assert seen["good", 200] > 1000
        assert rss_mb(worker) - before_mb < 40
        assert [line for line in server.log() if line["level"] in ("ERROR", "CRITICAL")] == []

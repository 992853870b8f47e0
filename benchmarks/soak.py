"""Serve good requests while a mix of attacks runs, and check that they stay correct and fast.

    python -m benchmarks.soak BUNDLE PHOTOS [--minutes 10] [--clients 2]

Starts a server with default settings. A second process attacks it without pause: clients that do not read, are idle, or send
heads and bodies byte by byte; JSON bombs; image bombs of each kind; OPTIONS requests and paths that climb out of the static
folder; repeated slashes; half-closed and reset connections; random bytes; and odd tensors. Meanwhile, ``--clients`` clients
classify photos one after the other and compare each result with that from before the attack.

Prints the number of correct and wrong results, the slowest one, the peak memory of all server processes (PSS), the workers
that were lost, and the attacks by kind. Exits with 1 if a result was wrong or took more than 2 s, if the memory exceeded
1 GiB, or if a worker was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import multiprocessing
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.serve_speed import read_photos
from models.artifacts.paths import resolve_bundle
from service.settings import Settings
from tests.helpers import bomb_images
from tests.helpers.odd_images import odd_images
from tests.helpers.server import LONG_TIMEOUTS, Server, children, serve

MAX_RESPONSE_S = 2.0
MAX_MEMORY_MIB = 1024
TOLERANCE = 0.02  # allowed difference of a probability: batches of different sizes round differently
SAMPLE_S = 0.25
HOLD_S = 8.0
CLIENT_TIMEOUT_S = 60.0
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("photos", type=Path, help="a folder with .jpg files")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=2)
    args = parser.parse_args()
    photos = read_photos(parser, args.photos)
    defaults = Settings()
    settings = {name: getattr(defaults, name) for name in LONG_TIMEOUTS}  # the helper's are for tests on busy machines
    with serve(resolve_bundle(args.bundle), **settings) as server:
        return report(soak(server, photos, args.minutes * 60, args.clients), args.minutes)


@dataclass
class Results:
    """What the good clients saw, and what the server took for it."""

    correct: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    idle_mib: float = 0.0
    peak_mib: float = 0.0
    workers_lost: int = 0
    errors_logged: int = 0
    attacks: dict[str, int] = field(default_factory=dict)


def soak(server: Server, photos: list[bytes], seconds: float, clients: int) -> Results:
    expected = [classify(server.port, photo) for photo in photos]
    if failed := [result for result in expected if isinstance(result, str)]:
        raise RuntimeError(f"a photo could not be classified before the attack: {failed[0]}")
    results, workers, lock = Results(idle_mib=memory_mib(server.pid)), server.workers(), threading.Lock()
    until = time.monotonic() + seconds

    def client(offset: int) -> None:
        for number in itertools.count(offset):
            if time.monotonic() > until:
                return
            index = number % len(photos)
            began = time.perf_counter()
            result = classify(server.port, photos[index])
            took_s = time.perf_counter() - began
            with lock:
                results.slowest_s = max(results.slowest_s, took_s)
                if isinstance(result, dict) and agree(result, expected[index]):
                    results.correct += 1
                else:
                    results.wrong[result if isinstance(result, str) else "another result"] += 1

    context = multiprocessing.get_context("spawn")
    stop, counts = context.Event(), context.Queue()
    attacker = context.Process(target=attack, args=(server.port, stop, counts), daemon=True)
    attacker.start()
    threads = [threading.Thread(target=client, args=(i * 7,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        results.peak_mib = max(results.peak_mib, memory_mib(server.pid))
        results.workers_lost = len(set(workers) - set(server.workers()))
        time.sleep(SAMPLE_S)
    for thread in threads:
        thread.join()
    stop.set()
    results.attacks = counts.get(timeout=120)
    attacker.join(30)
    results.errors_logged = sum(line["level"] in ("ERROR", "CRITICAL") for line in server.log())
    return results


def report(results: Results, minutes: float) -> int:
    wrong = sum(results.wrong.values())
    print(f"{minutes:g} minutes: {results.correct} results correct, {wrong} wrong {dict(results.wrong) or ''}".rstrip())
    print(f"slowest result {results.slowest_s:.2f} s; limit {MAX_RESPONSE_S:g} s")
    print(f"peak memory {results.peak_mib:.0f} MiB, before the attack {results.idle_mib:.0f} MiB; limit {MAX_MEMORY_MIB} MiB")
    print(f"{results.workers_lost} workers lost, {results.errors_logged} errors logged")
    print("attacks: " + ", ".join(f"{name} {count}" for name, count in sorted(results.attacks.items())))
    is_broken = (
        wrong > 0
        or results.correct == 0
        or results.slowest_s > MAX_RESPONSE_S
        or results.peak_mib > MAX_MEMORY_MIB
        or results.workers_lost > 0
    )
    return int(is_broken)


# Good requests


def classify(port: int, photo: bytes) -> dict[str, float] | str:
    """Return the probabilities of a photo, or what went wrong."""
    try:
        status, body = send(port, "POST", "/predict", photo, {"Content-Type": "image/jpeg"})
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    if status != 200:
        return f"{status} {json.loads(body).get('code', '')}"
    probabilities: dict[str, float] = json.loads(body)["predictions"][0]["probabilities"]
    return probabilities


def agree(result: dict[str, float], expected: Any) -> bool:
    return result.keys() == expected.keys() and all(abs(result[name] - expected[name]) < TOLERANCE for name in result)


def send(
    port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CLIENT_TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()


def memory_mib(pid: int) -> float:
    """Return the proportional set size of a process and its descendants."""
    kib = 0
    pending = [pid]
    while pending:
        process = pending.pop()
        pending += children(process)
        with contextlib.suppress(OSError, ValueError):  # it may have ended
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            kib += int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:")))
    return kib / 1024


# Attacks, in a process of their own, so that they do not delay the good clients


def attack(port: int, stop: Event, counts: Any) -> None:
    """Run every kind of attack in its own thread until ``stop`` is set, then put their counts."""
    done: Counter[str] = Counter()
    kinds = attacks(port)

    def repeat(name: str, once: Callable[[], None]) -> None:
        while not stop.wait(0.05):
            with contextlib.suppress(OSError, http.client.HTTPException):  # the server may cut an attacker off
                once()
            done[name] += 1

    threads = [threading.Thread(target=repeat, args=row) for row in kinds.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts.put(dict(done))


def attacks(port: int) -> dict[str, Callable[[], None]]:
    """Return one step of each attack by its name."""
    rng = random.Random(0)
    _, listing = send(port, "GET", "/models")
    infer = f"/v2/models/{json.loads(listing)['models'][0]['name']}/infer"
    images = itertools.cycle([*(data for data, _ in bomb_images.rejected().values()), *bomb_images.isolated().values()])
    odd = itertools.cycle(odd_images().values())
    documents = itertools.cycle(odd_tensors())
    json_bombs = itertools.cycle(large_json(infer))
    post = f"POST /predict HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: image/jpeg\r\n".encode()
    get = f"HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode()

    def hold(number: int, start: bytes, trickle: bytes = b"", *, receive_bytes: int | None = None) -> Callable[[], None]:
        """Open connections that send ``start``, then ``trickle`` byte by byte, and read nothing."""

        def step() -> None:
            with contextlib.ExitStack() as stack:
                opened = [stack.enter_context(connect(port, receive_bytes)) for _ in range(number)]
                for connection in opened:
                    with contextlib.suppress(OSError):
                        connection.sendall(start)
                until = time.monotonic() + HOLD_S
                for byte in itertools.cycle(trickle or b"\0"):
                    if time.monotonic() > until:
                        return
                    for connection in opened if trickle else ():
                        with contextlib.suppress(OSError):
                            connection.send(bytes([byte]), socket.MSG_DONTWAIT)
                    time.sleep(0.5)

        return step

    def raw(*choices: bytes) -> Callable[[], None]:
        def step() -> None:
            with connect(port) as connection:
                connection.sendall(rng.choice(choices))
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass

        return step

    def reset() -> None:
        with connect(port) as connection:
            connection.sendall(post + b"Content-Length: 100000\r\n\r\n" + rng.randbytes(rng.randrange(50_000)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def random_bytes() -> None:
        raw(rng.randbytes(rng.randrange(1, 5000)), post + rng.randbytes(300), b"\r\n" * rng.randrange(1, 2000))()

    def post_body(path: str, bodies: Iterator[bytes], content_type: str) -> Callable[[], None]:
        return lambda: void(send(port, "POST", path, next(bodies), {"Content-Type": content_type}))

    climb = b"/static/" + b"../" * 8
    return {
        "clients that do not read": hold(30, (b"GET /openapi.json " + get) * 60, receive_bytes=2048),
        "idle connections": hold(300, b""),
        "slow heads": hold(60, b"GET / HTTP/1.1\r\nX-Slow: ", b"a"),
        "slow bodies": hold(60, post + b"Content-Length: 1000\r\n\r\n", b"x"),
        "slow chunks": hold(30, post + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        "slow forms": hold(30, post.replace(b"/predict", b"/gallery/review") + b"Content-Length: 1000\r\n\r\n", b"x"),
        "JSON bombs": lambda: void(send(port, "POST", *next(json_bombs), {"Content-Type": "application/json"})),
        "image bombs": post_body("/predict", images, "image/jpeg"),
        "odd images": post_body("/predict", odd, "application/octet-stream"),
        "climbing paths": raw(*(b"OPTIONS " + climb + name + b" " + get for name in (b"dev/zero", b"etc/passwd", b"nofile"))),
        "repeated slashes": raw(
            *(post.replace(b"/", slashes, 1) + b"Content-Length: 4\r\n\r\njunk" for slashes in (b"//", b"////"))
        ),
        "half-closed connections": raw(b"GET /gallery " + get, b"GET /docs " + get, post + b"Content-Length: 9\r\n\r\nbroken"),
        "reset connections": reset,
        "random bytes": random_bytes,
        "odd tensors": post_body(infer, documents, "application/json"),
    }


def void(_: object) -> None:
    """Discard a result."""


def connect(port: int, receive_bytes: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(CLIENT_TIMEOUT_S)
    connection.connect(("127.0.0.1", port))
    return connection


def large_json(infer: str) -> list[tuple[str, bytes]]:
    """Return paths and bodies of nearly 20 MiB that expand to gigabytes when parsed."""

    def fill(start: bytes, item: bytes, end: bytes) -> bytes:
        return start + item * ((20 * MIB - 100 - len(start) - len(end)) // len(item)) + end

    pixels = b'{"inputs":[{"name":"pixels","datatype":"UINT8","shape":[1,224,224,3],"data":['
    return [
        ("/predict", fill(b'{"instances":[', b"[],", b"[]]}")),
        ("/predict", fill(b'{"instances":[', b'{"b64":"eA=="},', b"{}]}")),
        ("/predict", b"[" * (20 * MIB - 100)),
        (infer, fill(pixels, b"[],", b"[]]}]}")),
        (infer, fill(pixels, b"1,", b"1]}]}")),
        (infer, fill(b'{"outputs":[', b'{"name":"label"},', b'{"name":"label"}]}')),
    ]


def odd_tensors() -> Iterator[bytes]:
    """Yield requests of the inference protocol with one value replaced by an odd one."""
    tensor = {"name": "images", "datatype": "BYTES", "shape": [1], "data": ["eA=="], "parameters": {"binary_data_size": 1}}
    odd: list[Any] = [None, -1, 2**63, 1e308, "", [], {}, [[]], [1e9, 1e9], [-1, 3], ["a", None], "\0", True]
    for name, value in itertools.product(tensor, odd):
        yield json.dumps({"inputs": [tensor | {name: value}]}).encode()
    for value in odd:
        yield json.dumps({"inputs": value, "outputs": value}).encode()
        yield json.dumps({"inputs": [tensor], "outputs": [{"name": "label", "parameters": value}], "id": value}).encode()


if __name__ == "__main__":
    sys.exit(main())

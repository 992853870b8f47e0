"""Compare the throughput over HTTP with that of decoding plus inference alone.

    python benchmarks/serve_speed.py BUNDLE PHOTOS [--connections 16] [--seconds 2] [--rounds 25]

Each round measures two programs in turn while the other one waits. The baseline decodes photos and runs the engine in
threads, in the batches and the precision of the service. The service runs under gunicorn and receives requests over several
connections. The medians of the rounds and of the ratios within a round are printed, because the speed of a machine drifts. A
round in which the host of a virtual machine took much processor time is repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from models.artifacts.paths import resolve_bundle

MAX_PHOTOS = 64
MAX_STOLEN = 0.03
ATTEMPTS = 4
STALLED_S = 60.0  # without a response a measurement fails
CONNECTIONS = 16
BOUNDARY = f"{'':->24}kwZt0Zq3XoNRVLqYxOa7Bn"  # as long as curl's
T = TypeVar("T")


def main() -> int:
    parser = make_parser(__doc__, seconds=2.0, rounds=25)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--baseline", action="store_true", help=argparse.SUPPRESS)  # run as the baseline process
    args = parser.parse_args()
    args.bundle = resolve_bundle(args.bundle)
    photos = read_photos(parser, args.photos)
    if args.baseline:
        measure_on_request(Baseline(args.bundle, photos))
        return 0
    rates: dict[str, list[float]] = {"decoding and inference": [], "over HTTP": []}
    with baseline_process() as baseline, run_service(args.bundle) as port:
        requests = [encode_request(photo) for photo in photos]

        def both() -> tuple[float, list[float]]:
            return baseline(args.seconds), sorted(send_requests(port, requests, args.connections, args.seconds))

        both()  # warms up
        for number in range(args.rounds):
            rate, times_ms = measure_undisturbed(both)
            rates["decoding and inference"].append(rate)
            rates["over HTTP"].append(len(times_ms) / args.seconds)
            row = ", ".join(f"{name} {values[-1]:.1f}/s" for name, values in rates.items())
            p50, p99 = statistics.median(times_ms), times_ms[int(len(times_ms) * 0.99)]
            print(f"round {number + 1}: {row} (p50 {p50:.0f} ms, p99 {p99:.0f} ms)", file=sys.stderr, flush=True)
    for name, values in rates.items():
        print(f"{name:<24}{statistics.median(values):8.1f} photos/s")
    ratios = sorted(over / alone for alone, over in zip(*rates.values(), strict=True))
    print(f"{'ratio':<24}{statistics.median(ratios):8.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return 0


def make_parser(about: str | None, *, seconds: float, rounds: int) -> argparse.ArgumentParser:
    """Create the parser of a benchmark that runs in rounds."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("photos", type=Path, help="folder with .jpg files, searched recursively")
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def measure_undisturbed(measure: Callable[[], T]) -> T:
    """Call ``measure`` until the host steals at most MAX_STOLEN of the processor time, ATTEMPTS times at most.

    Other virtual machines on the same host may slow down one half of a round only. The kernel's count of stolen time
    decides whether a round is repeated, not its result.

    Returns:
        The result of the first undisturbed call, else that of the call with the least stolen time.
    """
    attempts: list[tuple[float, T]] = []
    for _ in range(ATTEMPTS):
        before = _processor_time()
        result = measure()
        stolen, total = (now - then for now, then in zip(_processor_time(), before, strict=True))
        fraction = stolen / total if total else 0.0
        if fraction <= MAX_STOLEN:
            return result
        attempts.append((fraction, result))
    fraction, result = min(attempts, key=lambda attempt: attempt[0])
    print(
        f"the host took at least {fraction:.0%} of the processor time in each of {ATTEMPTS} attempts",
        file=sys.stderr,
        flush=True,
    )
    return result


def _processor_time() -> tuple[int, int]:
    """Return the stolen and the total time in ticks of all processors, or zeros if the system does not count them."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except OSError:
        return 0, 0
    return ticks[7], sum(ticks)


def find_photos(parser: argparse.ArgumentParser, folder: Path) -> list[Path]:
    """Return up to MAX_PHOTOS files, evenly spaced in the folder. Exits with a usage error if there are none."""
    paths = sorted(folder.rglob("*.jpg"))
    if not paths:
        parser.error(f"no .jpg below {folder}")
    return paths[:: max(1, len(paths) // MAX_PHOTOS)][:MAX_PHOTOS]


def read_photos(parser: argparse.ArgumentParser, folder: Path) -> list[bytes]:
    """Read the files of ``find_photos``."""
    return [path.read_bytes() for path in find_photos(parser, folder)]


class Baseline:
    """Decoding and inference alone, with the settings of the service."""

    def __init__(self, path: Path, photos: list[bytes]) -> None:
        from models.artifacts.bundle import open_bundle
        from models.runtime.openvino_engine import OpenVINOEngine
        from models.runtime.precision import select_precision
        from service.cpu_allocation import allocate_resources
        from service.settings import Settings

        settings = Settings.from_environment({})
        resources = allocate_resources(settings)
        bundle = open_bundle(path)
        self._preprocessing, self._photos = bundle.preprocessing, photos
        self._threads, self._batch = resources.inference_threads, settings.max_batch_size
        precision = select_precision(bundle).name
        self._engine = OpenVINOEngine(
            bundle.graph(precision),
            outputs=["probabilities"],
            precision=precision,
            threads=resources.cpus_per_worker,
            streams=resources.streams,
            batch_sizes=(settings.max_batch_size,),
        )

    def rate(self, seconds: float) -> float:
        """Measure photos per second. The measured ``seconds`` start when as many batches are done as there are threads."""
        ends: list[float] = []
        with ThreadPoolExecutor(self._threads) as pool:
            for future in [pool.submit(self._work, number, ends, seconds) for number in range(self._threads)]:
                future.result()
        start = ends[self._threads - 1]
        return sum(start < end <= start + seconds for end in ends) * self._batch / seconds

    def _work(self, at: int, ends: list[float], seconds: float) -> None:
        """Compute batches and append to ``ends`` the time at which each one was done."""
        while len(ends) < self._threads or time.perf_counter() < ends[self._threads - 1] + seconds:
            images = [self._photos[(at + i) % len(self._photos)] for i in range(self._batch)]
            self._engine.run(np.stack([self._preprocessing.pixels(data) for data in images]))
            ends.append(time.perf_counter())
            at += self._batch


def measure_on_request(baseline: Baseline) -> None:
    """Measure for the number of seconds in each line of standard input, and print the rates."""
    for line in sys.stdin:
        print(baseline.rate(float(line)), flush=True)


@contextlib.contextmanager
def baseline_process() -> Iterator[Callable[[float], float]]:
    """Start a process that measures the baseline on request and idles in between. Yields the function that requests it."""
    command = [sys.executable, __file__, *sys.argv[1:], "--baseline"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as child:
        stdin, stdout = child.stdin, child.stdout
        assert stdin
        assert stdout

        def rate(seconds: float) -> float:
            print(seconds, file=stdin)
            if not (line := stdout.readline()):
                raise RuntimeError("the baseline could not be measured; see its error above")
            return float(line)

        yield rate


@contextlib.contextmanager
def run_service(path: Path, **settings: str) -> Iterator[int]:
    """Run the service until it is ready, and yield its port. ``settings`` are environment variables."""
    port = free_port()
    environ = {**os.environ, "BUNDLE": str(path), "PORT": str(port), "HOST": "127.0.0.1", **settings}
    server = subprocess.Popen([sys.executable, "-m", "service"], env=environ, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_until_ready(port, server)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


class Response(NamedTuple):
    """A response: when it was received (``time.perf_counter``), its time, the index of its request, and its bytes."""

    at: float
    time_ms: float
    request: int
    data: bytes


def send_requests(
    port: int,
    requests: Sequence[bytes],
    connections: int,
    seconds: float,
    *,
    on_response: Callable[[int, bytes], object] = lambda number, response: None,
) -> list[float]:
    """Send requests as ``stream_responses`` does. They count once every connection has received a response.

    Args:
        port: The port of the server.
        requests: The encoded requests, which are repeated.
        connections: The number of connections.
        seconds: The duration.
        on_response: Called with each response and the index of its request.

    Returns:
        The response times in milliseconds.
    """
    times_ms: list[float] = []
    deadline = math.inf
    with contextlib.closing(stream_responses(port, requests, connections)) as responses:
        for response in responses:
            if response.at > deadline:
                break
            on_response(response.request, response.data)
            times_ms.append(response.time_ms)
            if len(times_ms) == connections:
                deadline = response.at + seconds
    return times_ms[connections:]


def stream_responses(port: int, requests: Sequence[bytes], connections: int) -> Generator[Response, None, None]:
    """Send requests over kept-alive connections until the iterator is closed, and yield the responses.

    Each connection sends its next request when it has received its response. The client is one thread and its requests are
    encoded beforehand, because it shares the processors with the server.
    """
    numbers = itertools.cycle(range(len(requests)))
    sent: dict[socket.socket, tuple[int, float]] = {}
    received: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as opened:

        def send(connection: socket.socket) -> None:
            received[connection], sent[connection] = b"", (next(numbers), time.perf_counter())
            connection.sendall(requests[sent[connection][0]])

        for _ in range(connections):
            connection = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            selector.register(connection, selectors.EVENT_READ)
            send(connection)
        while True:
            ready = selector.select(timeout=STALLED_S)
            if not ready:
                raise RuntimeError(f"the server sent no response for {STALLED_S:g} s")
            for key, _ in ready:
                connection = key.fileobj  # type: ignore[assignment]
                received[connection] += (chunk := connection.recv(1 << 16))
                if not chunk:
                    raise RuntimeError("the server closed a connection")
                if not is_complete(received[connection]):
                    continue
                if not received[connection].startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(f"the server rejected a photo: {received[connection].decode()}")
                now, data = time.perf_counter(), received[connection]
                index, sent_at = sent[connection]
                send(connection)
                yield Response(now, (now - sent_at) * 1e3, index, data)


def is_complete(response: bytes) -> bool:
    """Return whether a response's head and complete body were received."""
    head, end, body = response.partition(b"\r\n\r\n")
    length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
    return bool(end) and len(body) >= int(length.partition(b":")[2])


def encode_request(photo: bytes, path: str = "/predict") -> bytes:
    """Encode an image as a multipart form, with the head of the request."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="photo.jpg"\r\n\r\n'
    body = head.encode() + photo + f"\r\n--{BOUNDARY}--\r\n".encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def _wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.perf_counter() + 120
    while time.perf_counter() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5)
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the service did not become ready. Start it to see why: python -m service")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())

"""Measure the goodput of the service when requests arrive at three times its capacity.

    python -m benchmarks.overload BUNDLE PHOTOS [--times 3] [--seconds 3] [--rounds 15]

Each round first measures the capacity: 16 connections send their next request when they have received a response. Then
requests arrive at a multiple of that rate, whether or not earlier ones were answered, like those of many independent clients.
The goodput counts responses with a prediction; all others must be 503 with `Retry-After`. The capacity is measured again at
the end, and the mean of the two counts, because the speed of a machine drifts. A round in which the host of a virtual machine
took much processor time is repeated. Client and server share the machine, so the client's processor time is printed. The exit
code is 1 if any request got another response, or none.
"""

from __future__ import annotations

import selectors
import socket
import statistics
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from benchmarks.serve_speed import (
    CONNECTIONS,
    encode_request,
    is_complete,
    make_parser,
    measure_undisturbed,
    read_photos,
    run_service,
    send_requests,
)
from models.artifacts.paths import resolve_bundle

SETTLE_S = 1.0  # time in which the queue fills


def main() -> int:
    parser = make_parser(__doc__, seconds=3.0, rounds=15)
    parser.add_argument("--times", type=float, default=3.0)
    args = parser.parse_args()
    photos = read_photos(parser, args.photos)
    ratios, unexpected = [], 0
    with run_service(resolve_bundle(args.bundle)) as port:
        requests = [encode_request(photo) for photo in photos]
        send_requests(port, requests, CONNECTIONS, 2.0)  # warm up

        def measure_capacity() -> float:
            return len(send_requests(port, requests, CONNECTIONS, args.seconds)) / args.seconds

        def one_round() -> tuple[float, float, Counter[str], int, float]:
            before = measure_capacity()
            responses, sent, cpu_s = OpenLoopClient(port, requests).run(args.times * before, args.seconds)
            return before, measure_capacity(), responses, sent, cpu_s

        for number in range(args.rounds):
            before, after, responses, sent, cpu_s = measure_undisturbed(one_round)
            capacity, goodput = (before + after) / 2, responses["200"] / args.seconds
            ratios.append(goodput / capacity)
            others = {status: count for status, count in sorted(responses.items()) if status not in ("200", "503")}
            unexpected += sum(others.values())
            print(
                f"round {number + 1}: capacity {capacity:.1f}/s, {sent / args.seconds:.1f}/s sent, {goodput:.1f}/s predicted,"
                f" {responses['503'] / args.seconds:.1f}/s rejected{f', others {others}' if others else ''};"
                f" the client used {cpu_s / args.seconds:.2f} of a processor",
                file=sys.stderr,
                flush=True,
            )
    print(f"goodput over capacity {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return int(unexpected > 0)


@dataclass
class OpenLoopClient:
    """Send requests at a steady rate, each on an idle or a new connection."""

    port: int
    requests: list[bytes]
    responses: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _free: deque[socket.socket] = field(default_factory=deque)
    _unsent: dict[socket.socket, bytes] = field(default_factory=dict)
    _received: dict[socket.socket, bytes] = field(default_factory=dict)

    def run(self, rate: float, seconds: float) -> tuple[Counter[str], int, float]:
        """Send ``rate`` requests per second for SETTLE_S, which do not count, and then for ``seconds``.

        Returns:
            The responses by status, the number of requests, and the client's processor time in seconds.
        """
        self._send_at_rate(rate, SETTLE_S)
        self.responses.clear()
        self.sent, cpu = 0, time.thread_time()
        self._send_at_rate(rate, seconds)
        result = self.responses.copy(), self.sent, time.thread_time() - cpu
        while len(self._free) < len(self._received):  # accepted requests must not disturb the next measurement
            self._poll(1.0)
        for connection in list(self._received):
            self._drop(connection)
        return result

    def _send_at_rate(self, rate: float, seconds: float) -> None:
        start, number = time.perf_counter(), 0
        while (now := time.perf_counter() - start) < seconds:
            while number < now * rate:
                self._send(self.requests[number % len(self.requests)])
                number += 1
            self._poll(max(0.0, number / rate - now))

    def _poll(self, timeout_s: float) -> None:
        for key, events in self._selector.select(timeout_s):
            self._advance(key.fileobj, events)  # type: ignore[arg-type]

    def _send(self, request: bytes) -> None:
        if self._free:
            connection = self._free.popleft()
        else:
            connection = socket.create_connection(("127.0.0.1", self.port))
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
        self.sent += 1
        self._received[connection], self._unsent[connection] = b"", request
        self._advance(connection, selectors.EVENT_WRITE)

    def _advance(self, connection: socket.socket, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._read(connection)
            elif rest := self._unsent[connection]:
                self._unsent[connection] = rest = rest[connection.send(rest) :]
                self._selector.modify(connection, selectors.EVENT_READ | (selectors.EVENT_WRITE if rest else 0))
        except BlockingIOError:
            self._selector.modify(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
        except OSError as error:
            self.responses[type(error).__name__] += 1
            self._drop(connection)

    def _read(self, connection: socket.socket) -> None:
        chunk = connection.recv(1 << 16)
        response = self._received[connection] = self._received[connection] + chunk
        if is_complete(response):
            status = response[9:12].decode()
            head = response.partition(b"\r\n\r\n")[0].lower()
            self.responses[status if status != "503" or b"\r\nretry-after: " in head else "503 without Retry-After"] += 1
            if self._unsent[connection] or b"\r\nconnection: close" in head:
                self._drop(connection)
            else:
                self._received[connection] = b""
                self._free.append(connection)
        elif not chunk:
            if connection not in self._free:
                self.responses["no response"] += 1
            self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._received[connection], self._unsent[connection]
        if connection in self._free:
            self._free.remove(connection)
        connection.close()


if __name__ == "__main__":
    sys.exit(main())

"""How much does the service still answer when three times as much arrives as it can do?

    python -m benchmarks.overload BUNDLE PHOTOS [--times 3] [--seconds 3] [--rounds 15]

In each round the service is asked by 16 connections first, each its next photo when it has its answer: what comes out is its
capacity. Then photos arrive at so many times that rate, whether it has answered the ones before or not, as they do from many
clients that know nothing of each other. What it answers with a prediction is the goodput; all others have to be refused with
503 and a `Retry-After`. At the end the capacity is measured again, and the mean of the two counts: a machine's speed drifts.
A round in which a virtual machine's host took much of the time away is repeated. Client and server share the machine, and the
client's part is printed.
The program ends with 1 where any request got another answer, or none.
"""

from __future__ import annotations

import selectors
import socket
import statistics
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from benchmarks.serve_speed import CONNECTIONS, ask, is_whole, make_parser, quiet, read_photos, request_of, serving
from models.artifacts.paths import resolve_bundle

SETTLE_S = 1.0  # until the queue is full


def main() -> int:
    parser = make_parser(__doc__, seconds=3.0, rounds=15)
    parser.add_argument("--times", type=float, default=3.0)
    args = parser.parse_args()
    photos = read_photos(parser, args.photos)
    ratios, astray = [], 0
    with serving(resolve_bundle(args.bundle)) as port:
        ask(port, photos, CONNECTIONS, 2.0)  # warms up
        requests = [request_of(photo) for photo in photos]

        def capacity() -> float:
            return len(ask(port, photos, CONNECTIONS, args.seconds)) / args.seconds

        def one_round() -> tuple[float, float, Counter[str], int, float]:
            before = capacity()
            answers, sent, cpu_s = Flood(port, requests).run(args.times * before, args.seconds)
            return before, capacity(), answers, sent, cpu_s

        for number in range(args.rounds):
            before, after, answers, sent, cpu_s = quiet(one_round)
            most, goodput = (before + after) / 2, answers["200"] / args.seconds
            ratios.append(goodput / most)
            others = {status: count for status, count in sorted(answers.items()) if status not in ("200", "503")}
            astray += sum(others.values())
            print(
                f"round {number + 1}: capacity {most:.1f}/s, {sent / args.seconds:.1f}/s arrived, {goodput:.1f}/s answered,"
                f" {answers['503'] / args.seconds:.1f}/s refused{f', besides {others}' if others else ''};"
                f" the client took {cpu_s / args.seconds:.2f} of a processor",
                file=sys.stderr,
                flush=True,
            )
    print(f"goodput over capacity {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return int(astray > 0)


@dataclass
class Flood:
    """Requests at a steady rate, each on a connection that is free or on a new one."""

    port: int
    requests: list[bytes]
    answers: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _free: deque[socket.socket] = field(default_factory=deque)
    _unsent: dict[socket.socket, bytes] = field(default_factory=dict)
    _arrived: dict[socket.socket, bytes] = field(default_factory=dict)

    def run(self, rate: float, seconds: float) -> tuple[Counter[str], int, float]:
        """``rate`` requests a second, for ``seconds`` after those in which the queue fills, which are not counted.

        Gives the answers by status, how many were asked for, and the seconds that this took of a processor.
        """
        self._arrive(rate, SETTLE_S)
        self.answers.clear()
        self.sent, cpu = 0, time.thread_time()
        self._arrive(rate, seconds)
        found = self.answers.copy(), self.sent, time.thread_time() - cpu
        while len(self._free) < len(self._arrived):  # what was accepted is in nobody's way afterwards
            self._listen(1.0)
        for connection in list(self._arrived):
            self._drop(connection)
        return found

    def _arrive(self, rate: float, seconds: float) -> None:
        began, number = time.perf_counter(), 0
        while (now := time.perf_counter() - began) < seconds:
            while number < now * rate:
                self._send(self.requests[number % len(self.requests)])
                number += 1
            self._listen(max(0.0, number / rate - now))

    def _listen(self, timeout_s: float) -> None:
        for key, events in self._selector.select(timeout_s):
            self._go_on(key.fileobj, events)  # type: ignore[arg-type]

    def _send(self, request: bytes) -> None:
        if self._free:
            connection = self._free.popleft()
        else:
            connection = socket.create_connection(("127.0.0.1", self.port))
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
        self.sent += 1
        self._arrived[connection], self._unsent[connection] = b"", request
        self._go_on(connection, selectors.EVENT_WRITE)

    def _go_on(self, connection: socket.socket, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._read(connection)
            elif rest := self._unsent[connection]:
                self._unsent[connection] = rest = rest[connection.send(rest) :]
                self._selector.modify(connection, selectors.EVENT_READ | (selectors.EVENT_WRITE if rest else 0))
        except BlockingIOError:
            self._selector.modify(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
        except OSError as error:
            self.answers[type(error).__name__] += 1
            self._drop(connection)

    def _read(self, connection: socket.socket) -> None:
        piece = connection.recv(1 << 16)
        answer = self._arrived[connection] = self._arrived[connection] + piece
        if is_whole(answer):
            status = answer[9:12].decode()
            head = answer.partition(b"\r\n\r\n")[0].lower()
            self.answers[status if status != "503" or b"\r\nretry-after: " in head else "503 without Retry-After"] += 1
            if self._unsent[connection] or b"\r\nconnection: close" in head:
                self._drop(connection)
            else:
                self._arrived[connection] = b""
                self._free.append(connection)
        elif not piece:
            if connection not in self._free:
                self.answers["no answer"] += 1
            self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._arrived[connection], self._unsent[connection]
        if connection in self._free:
            self._free.remove(connection)
        connection.close()


if __name__ == "__main__":
    sys.exit(main())

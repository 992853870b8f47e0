"""Connections whose every byte is sent by hand, to a service with the tiny bundle: half requests, slow ones, many at once."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import time
from collections.abc import Callable, Iterator

from PIL import Image

from service.http.gunicorn_worker import LINGER_S
from tests.helpers.server import ANSWER_S, Reply, Server, poll
from tests.helpers.tiny_network import COLORS


def photo_of(color: tuple[int, int, int], size: tuple[int, int] = (56, 44)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


RED = photo_of(COLORS[1])
HEAVY = photo_of(COLORS[1], (3000, 2500))  # some kB that take a while to decode
BOMB = photo_of((0, 0, 0), (9000, 9000))  # 81 million pixels


def probabilities(reply: Reply) -> list[float]:
    assert reply.status == 200, reply.body
    (row,) = reply.json()["predictions"]
    return [round(value, 5) for value in row["probabilities"].values()]


class Line:
    """A connection whose every byte is sent by hand."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=ANSWER_S)
        self._source = self.socket.makefile("rb")  # one for all answers: it reads ahead

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, rudely: bool = False) -> None:
        """End the connection; ``rudely``, it is reset."""
        if rudely:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._source.close()
        self.socket.close()

    def head(self, length: int | str, *, path: str = "/predict", **headers: str) -> bytes:
        lines = {"Host": "localhost", "Content-Type": "image/png"}
        lines |= {name.replace("_", "-"): text for name, text in headers.items()}
        if length != "chunked":
            lines["Content-Length"] = str(length)
        else:
            lines["Transfer-Encoding"] = "chunked"
        return f"POST {path} HTTP/1.1\r\n".encode() + "".join(f"{a}: {b}\r\n" for a, b in lines.items()).encode() + b"\r\n"

    def begin(self, photo: bytes = RED, **headers: str) -> bytes:
        """Send the head of a request and half of its body; gives the other half."""
        half = len(photo) // 2
        self.socket.sendall(self.head(len(photo), **headers) + photo[:half])
        return photo[half:]

    def begin_when_read(self, photo: bytes = RED) -> bytes:
        """As ``begin``, but with the half of the body only when the server has read the head and says to go on."""
        half = len(photo) // 2
        self.socket.sendall(self.head(len(photo), Expect="100-continue"))
        assert self._source.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert self._source.readline() == b"\r\n"
        self.socket.sendall(photo[:half])
        return photo[half:]

    def answer(self) -> Reply:
        """The next one; who was told to go on is not answered yet."""
        status = 100
        while status == 100:
            status = int(self._source.readline().split()[1])
            headers = http.client.parse_headers(self._source)
        return Reply(status, headers, self._source.read(int(headers["Content-Length"])))

    def is_closed(self) -> bool:
        """Whether the server ends the connection, in order: no reset, and nothing more said."""
        return self._source.read(1) == b""


def told(send: Callable[[], Reply]) -> Reply:
    """What a client is answered that sends for longer than the server wants.

    The server reads on for LINGER_S. A client that the machine holds up for longer finds a reset, and begins again; one that
    was quicker must not.
    """

    def answer() -> Reply | None:
        began = time.monotonic()
        try:
            return send()
        except ConnectionError:
            assert time.monotonic() - began > LINGER_S
            return None

    return poll(answer)


def inside(server: Server) -> float:
    return server.metrics()["classifier_in_flight_images"]


@contextlib.contextmanager
def halves(server: Server, count: int) -> Iterator[list[tuple[Line, bytes]]]:
    """So many requests whose heads the server has read, and the other half of each one's body."""
    with contextlib.ExitStack() as open_lines:
        lines = [open_lines.enter_context(Line(server)) for _ in range(count)]
        yield [(line, line.begin_when_read()) for line in lines]


class Held:
    """Requests in flight: photos that the server does not decode until they are released."""

    def __init__(self, server: Server) -> None:
        self._server, self._file = server, server.log_file.with_name("hold")
        self.lines: list[Line] = []

    def send(self, count: int) -> None:
        """Send so many more."""
        for _ in range(count):
            self.lines.append(line := Line(self._server))
            line.socket.sendall(line.head(len(RED)) + RED)

    def hold(self) -> None:
        self._file.touch()

    def release(self) -> None:
        self._file.unlink(missing_ok=True)

    def answers(self) -> list[Reply]:
        """Release them all and read their answers."""
        self.release()
        return [line.answer() for line in self.lines]


@contextlib.contextmanager
def held(server: Server, count: int) -> Iterator[Held]:
    """Keep so many requests in flight until they are released, or the block ends. Nothing else is decoded meanwhile."""
    holding = Held(server)
    holding.hold()
    try:
        holding.send(count)
        poll(lambda: inside(server) == count)
        yield holding
    finally:
        holding.release()
        for line in holding.lines:
            line.close()

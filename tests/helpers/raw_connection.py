"""Raw connections to a service with the tiny bundle, for incomplete, slow and concurrent requests."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import time
from collections.abc import Callable, Iterator

from PIL import Image

from service.http.gunicorn_worker import LINGER_S
from tests.helpers.server import RESPONSE_TIMEOUT_S, Response, Server, poll
from tests.helpers.tiny_network import COLORS


def image_of(color: tuple[int, int, int], size: tuple[int, int] = (56, 44)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


RED = image_of(COLORS[1])
HEAVY = image_of(COLORS[1], (3000, 2500))  # a few KB that take some time to decode
BOMB = image_of((0, 0, 0), (9000, 9000))  # 81 million pixels


def probabilities(response: Response) -> list[float]:
    """Return the probabilities of a prediction of one image."""
    assert response.status == 200, response.body
    (row,) = response.json()["predictions"]
    return [round(value, 5) for value in row["probabilities"].values()]


class RawConnection:
    """A connection that sends exactly the given bytes."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=RESPONSE_TIMEOUT_S)
        self._source = self.socket.makefile("rb")  # one for all responses, as it reads ahead

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, reset: bool = False) -> None:
        """Close the connection, or reset it."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._source.close()
        self.socket.close()

    def head(self, length: int | str, *, path: str = "/predict", **headers: str) -> bytes:
        """Return the head of a POST request with a body of ``length`` bytes, or in chunks if it is "chunked"."""
        fields = {"Host": "localhost", "Content-Type": "image/png"}
        fields |= {name.replace("_", "-"): text for name, text in headers.items()}
        if length != "chunked":
            fields["Content-Length"] = str(length)
        else:
            fields["Transfer-Encoding"] = "chunked"
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "\r\n"]).encode()

    def send_half(self, photo: bytes = RED, **headers: str) -> bytes:
        """Send the head of a request and the first half of its body. Returns the second half."""
        half = len(photo) // 2
        self.socket.sendall(self.head(len(photo), **headers) + photo[:half])
        return photo[half:]

    def send_half_after_continue(self, photo: bytes = RED) -> bytes:
        """Like ``send_half``, but send the half once the server has read the head and sent 100 Continue."""
        half = len(photo) // 2
        self.socket.sendall(self.head(len(photo), Expect="100-continue"))
        assert self._source.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert self._source.readline() == b"\r\n"
        self.socket.sendall(photo[:half])
        return photo[half:]

    def response(self) -> Response:
        """Read the next response, skipping 100 Continue."""
        status = 100
        while status == 100:
            status = int(self._source.readline().split()[1])
            headers = http.client.parse_headers(self._source)
        return Response(status, headers, self._source.read(int(headers["Content-Length"])))

    def is_closed(self) -> bool:
        """Return whether the server closes the connection without a reset and without further bytes."""
        return self._source.read(1) == b""


def send_with_retry(send: Callable[[], Response]) -> Response:
    """Return the response to a client that may still be sending when it is rejected.

    The server reads on for LINGER_S. Only a client that a busy machine delays for longer may be reset, and retries.
    """

    def attempt() -> Response | None:
        started = time.monotonic()
        try:
            return send()
        except ConnectionError:
            assert time.monotonic() - started > LINGER_S
            return None

    return poll(attempt)


def in_flight(server: Server) -> float:
    return server.metrics()["classifier_in_flight_images"]


@contextlib.contextmanager
def half_sent_requests(server: Server, count: int) -> Iterator[list[tuple[RawConnection, bytes]]]:
    """Open ``count`` requests whose heads the server has read. Yields each with the second half of its body."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(RawConnection(server)) for _ in range(count)]
        yield [(connection, connection.send_half_after_continue()) for connection in opened]


class HeldRequests:
    """Requests in flight, whose images the server does not decode until they are released."""

    def __init__(self, server: Server) -> None:
        self._server, self._file = server, server.log_file.with_name("hold")
        self.connections: list[RawConnection] = []

    def send(self, count: int) -> None:
        """Send ``count`` more requests."""
        for _ in range(count):
            self.connections.append(connection := RawConnection(self._server))
            connection.socket.sendall(connection.head(len(RED)) + RED)

    def hold(self) -> None:
        self._file.touch()

    def release(self) -> None:
        self._file.unlink(missing_ok=True)

    def responses(self) -> list[Response]:
        """Release all requests and read their responses."""
        self.release()
        return [connection.response() for connection in self.connections]


@contextlib.contextmanager
def hold_requests(server: Server, count: int) -> Iterator[HeldRequests]:
    """Keep ``count`` requests in flight until they are released or the block ends. Nothing else is decoded meanwhile."""
    poll(lambda: in_flight(server) == 0)  # those of an earlier test
    requests = HeldRequests(server)
    requests.hold()
    try:
        requests.send(count)
        poll(lambda: in_flight(server) == count)
        yield requests
    finally:
        requests.release()
        for connection in requests.connections:
            connection.close()

"""An answer's head and the first piece of its body, sent in one go."""

from __future__ import annotations

from typing import Any

from gunicorn import util
from gunicorn.http import wsgi


class Response(wsgi.Response):
    """gunicorn's own sends the head by itself, which wakes the client twice and lets others at Python's lock once more."""

    sock: Any

    def write(self, data: bytes) -> None:
        if self.headers_sent:
            super().write(data)
            return
        connection, self.sock = self.sock, SendBuffer()
        try:
            super().write(data)
            piece = self.sock
        finally:
            self.sock = connection
        util.write(connection, bytes(piece))


class SendBuffer(bytearray):
    """What a socket would have been given."""

    sendall = bytearray.extend

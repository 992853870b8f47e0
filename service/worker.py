"""gunicorn's threaded worker, whose threads stay a moment with a connection whose client asks again at once."""

from __future__ import annotations

import select
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

LINGER_MS = 3


class LingeringWorker(ThreadWorker):
    """Clients that keep a connection busy, as a proxy does, are answered without a way through the main thread each time."""

    def handle(self, conn: Any) -> Any:
        keep = super().handle(conn)
        while keep is True and self.alive and _readable(conn):
            keep = super().handle(conn)
        return keep


def _readable(conn: Any) -> bool:
    """Whether the next request begins to arrive within LINGER_MS; HTTP/2 has its own way."""
    if conn.is_http2 or conn.parser.unreader.buf.getvalue():
        return False
    poll = select.poll()
    poll.register(conn.sock, select.POLLIN)
    return bool(poll.poll(LINGER_MS))

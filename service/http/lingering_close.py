"""How a worker parts from a client: it says that it is done, and listens until the client has closed.

Who closes while bytes of the client's are unread, or still on their way, has them answered with a reset, and the client that
still sends finds that in place of its answer. gunicorn listens too, for 64 KiB at most, but in its main thread, which a client
that does not close would keep from all others.
"""

from __future__ import annotations

import contextlib
import socket
import time
from concurrent.futures import Future
from functools import partial
from selectors import EVENT_READ
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

LINGER_TIMEOUT_S = 2.0
MAX_DRAIN_BYTES = (
    1 << 16
)  # bytes of a refused body that are read for the sake of the next request; of more, the connection is ended
CHUNK_BYTES = 1 << 18


class LingeringCloseWorker(ThreadWorker):
    """Listens to all of them in its main thread at once, to each for LINGER_TIMEOUT_S at most."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.receive_buffer = memoryview(bytearray(CHUNK_BYTES))  # what was received last; the main thread's alone
        self._parting: dict[Any, float] = {}  # connections in the order in which their time is over

    def finish_request(self, conn: Any, fs: Future[Any]) -> None:
        if fs.cancelled() or fs.exception() or fs.result() is not False:
            super().finish_request(conn, fs)
        else:
            self.close_gracefully(conn)

    def murder_pending(self) -> None:
        """What gunicorn calls after every look at its connections."""
        super().murder_pending()
        now = time.monotonic()
        while self._parting and now > next(iter(self._parting.values())):
            self.close_connection(next(iter(self._parting)))

    def close_gracefully(self, conn: Any) -> None:
        """Say that nothing more is said; ``conn`` is in the poller no more."""
        try:
            conn.sock.setblocking(False)
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:  # it is gone already
            self.close_connection(conn)
            return
        self._parting[conn] = time.monotonic() + LINGER_TIMEOUT_S
        self.poller.register(conn.sock, EVENT_READ, partial(self._listen, conn))

    def receive(self, conn: Any, most: int = CHUNK_BYTES) -> int | None:
        """Read into ``receive_buffer`` what has arrived, ``most`` bytes at most: gives how many, 0 at the end, None where none are."""
        try:
            return conn.sock.recv_into(self.receive_buffer[:most], 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return 0

    def close_connection(self, conn: Any) -> None:
        """Close ``conn``, whether it is listened to or not."""
        self._parting.pop(conn, None)
        with contextlib.suppress(OSError, ValueError, KeyError):  # not in the poller, or a socket that its client reset
            self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()

    def _listen(self, conn: Any, _: Any) -> None:
        if self.receive(conn) == 0:
            self.close_connection(conn)

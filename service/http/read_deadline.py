"""How long a client may take to send: one thread ends the reading from those that trickle, so that none can hold a server's.

Time-outs on a socket count from one piece to the next, and cost two system calls each; this counts from the first.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

CHECK_INTERVAL_S = 0.25


class ReadDeadlines:
    """Sockets that are being read from, and until when. A late one reads as ended; its answer can still be sent."""

    def __init__(self) -> None:
        self._until: dict[socket.socket, float] = {}
        self._late: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, connection: socket.socket, seconds: float) -> None:
        """From now on ``connection`` has ``seconds`` to send what is wanted of it."""
        self._until[connection] = time.monotonic() + seconds
        if self._thread is None:  # not before: threads do not live through a fork
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._watch, name="patience", daemon=True)
                    self._thread.start()

    def end(self, connection: socket.socket) -> bool:
        """It sent all. Gives whether it was too late, and cut off."""
        self._until.pop(connection, None)
        if connection not in self._late:
            return False
        self._late.discard(connection)
        return True

    def _watch(self) -> None:
        while True:
            time.sleep(CHECK_INTERVAL_S)
            now = time.monotonic()
            for connection, until in list(self._until.items()):
                if now > until:
                    self._late.add(connection)  # before it is let go, so that who ends it now sees that it was late
                    if self._until.pop(connection, None) is None:
                        self._late.discard(connection)
                        continue
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RD)


read_deadlines = ReadDeadlines()

"""gunicorn's threaded worker, with what it lacks: an end to headers that trickle, and no detour for busy connections."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Any

from gunicorn.http import wsgi

from service.http.early_rejection import EarlyRejectionWorker
from service.http.read_deadline import read_deadlines
from service.http.response import Response

HEADER_TIMEOUT_S = 15.0
LINGER_MS = 3
CHUNK_BYTES = 1 << 17
LINGER = struct.pack("ll", 0, LINGER_MS * 1000)  # a timeval
NEVER = struct.pack("ll", 0, 0)
wsgi.Response = Response  # gunicorn names no other place to say so


class Worker(EarlyRejectionWorker):
    """Its threads stay a moment with a connection whose client asks again at once, as a proxy does.

    gunicorn itself passes such a connection through the main thread each time, which under load costs as much as parsing it.
    """

    def init_process(self) -> None:
        # A thread that is woken waits for its turn, and does not break off another in the middle of its computing.
        if hasattr(os, "SCHED_BATCH"):
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        super().init_process()

    def handle(self, conn: Any) -> Any:
        keep = self._handle(conn)
        while keep is True and self.alive and not self.middleware.admission.is_busy and _goes_on(conn):
            keep = self._handle(conn)
        return keep

    def _handle(self, conn: Any) -> Any:
        read_deadlines.begin(conn.sock, HEADER_TIMEOUT_S)  # ended where the application takes over (service.http.middleware)
        try:
            return super().handle(conn)
        finally:
            read_deadlines.end(conn.sock)


def _goes_on(conn: Any) -> bool:
    """Whether the next request begins to arrive within LINGER_MS. It is read then, with its photo if that is there too.

    One call where gunicorn takes three: each lets another thread at Python's lock, and waits for it afterwards. HTTP/2 has its
    own way.
    """
    if conn.is_http2 or conn.parser.unreader.buf.getvalue():
        return False
    conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, LINGER)
    try:
        conn.parser.unreader.unread(conn.sock.recv(CHUNK_BYTES))
    except BlockingIOError:
        return False
    except OSError:  # a reset, which gunicorn finds as well
        return True
    finally:
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, NEVER)
    return True

"""gunicorn's threaded worker, with what it lacks: an end to headers that trickle, and no detour for busy connections."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from service.patience import patience

HEADERS_S = 15.0
LINGER_MS = 3
LEAVE_S = 2.0
PIECE = 1 << 17
LINGER = struct.pack("ll", 0, LINGER_MS * 1000)  # a timeval
NEVER = struct.pack("ll", 0, 0)


class Worker(ThreadWorker):
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
        while keep is True and self.alive and _goes_on(conn):
            keep = self._handle(conn)
        if keep is False:
            _take_leave(conn.sock)
        return keep

    def handle_request(self, req: Any, conn: Any) -> Any:
        # An answer must say that it is the connection's last: what a client sends behind one that does not is lost.
        req.body.end_connection = req.force_close
        return super().handle_request(req, conn)

    def _handle(self, conn: Any) -> Any:
        patience.begin(conn.sock, HEADERS_S)  # ended where the application takes over (service.gate)
        try:
            return super().handle(conn)
        finally:
            patience.end(conn.sock)


def _take_leave(connection: socket.socket) -> None:
    """Read on until the client has closed, for LEAVE_S at most: one that still sends would find a reset and no answer.

    gunicorn does so for 64 KiB, and in the main thread, which a client that does not close would keep from all others.
    """
    until = time.monotonic() + LEAVE_S
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while (left_s := until - time.monotonic()) > 0:
            connection.settimeout(left_s)
            if not connection.recv(1 << 18):
                return
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)


def _goes_on(conn: Any) -> bool:
    """Whether the next request begins to arrive within LINGER_MS. It is read then, with its photo if that is there too.

    One call where gunicorn takes three: each lets another thread at Python's lock, and waits for it afterwards. HTTP/2 has its
    own way.
    """
    if conn.is_http2 or conn.parser.unreader.buf.getvalue():
        return False
    conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, LINGER)
    try:
        conn.parser.unreader.unread(conn.sock.recv(PIECE))
    except BlockingIOError:
        return False
    except OSError:  # a reset, which gunicorn finds as well
        return True
    finally:
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, NEVER)
    return True

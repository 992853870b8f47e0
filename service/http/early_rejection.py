"""What a full house says at the door: requests for predictions are refused in the main thread, for a fifth of the work.

gunicorn hands every request to a thread. When three times as many arrive as can be answered, most of the threads only refuse,
and their fight for Python's lock, and for processors, with those that answer costs more than the refusing itself. The main
thread takes what has arrived, in one go, and waits for nobody.
"""

from __future__ import annotations

import functools
import re
import socket
import time
import uuid
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

from gunicorn.http import get_parser

from service.http.lingering_close import MAX_DRAIN_BYTES, LingeringCloseWorker
from service.http.response import SendBuffer

if TYPE_CHECKING:  # this module is imported before the fork: Flask must not be yet, nor prometheus_client without its folder
    from service.http.middleware import RequestMiddleware

RESPONSE_MAX_AGE_S = 0.25
MAX_ACCEPTS = 32
MAX_HEAD_BYTES = 8192
# A head without anything that changes how its body is read, or what is answered. All others are a thread's, with gunicorn's
# own parser, which refuses them as well.
PLAIN = re.compile(
    rb"""POST\ /predict(?:\?[!-~]*)?\ HTTP/1\.1\r\n
    (?: (?i:content-length):\ (?P<length>[0-9]{1,12})\r\n
      | (?i:x-request-id):\ (?P<id>[\w.:-]{16,64})\r\n
      | (?i:connection:\ keep-alive)\r\n
      | (?!(?i:content-length|x-request-id|connection|transfer-encoding|expect|upgrade|origin):) [A-Za-z0-9-]+:[\ -~\t]*\r\n
    )* \r\n""",
    re.VERBOSE,
)
SAMPLE = b"POST /predict HTTP/1.1\r\nX-Request-ID: %b\r\nContent-Length: %d\r\n\r\n"
KEPT: Future[bool] = Future()
KEPT.set_result(True)


class RejectionResponse(NamedTuple):
    """The bytes of a refusal with zeros for the request's id, whether its connection is kept, and until when it is true."""

    answer: bytes
    keep: bool
    until: float


class EarlyRejectionWorker(LingeringCloseWorker):
    """Lets in, and refuses, what has arrived once the house is half full; before that, and all else, gunicorn's own way.

    A place in the house is taken here, or else all that come before a thread had its turn would seem to have one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refusals: dict[tuple[bool, int], RejectionResponse] = {}

    @functools.cached_property
    def middleware(self) -> RequestMiddleware:
        middleware: RequestMiddleware = self.wsgi.extensions["gate"]
        return middleware

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        # Whoever knocks at a full house can as well wait until several do: to be woken for each costs more than to refuse it.
        if self.alive and (accept_pause_s := self.middleware.admission.accept_pause_s):
            time.sleep(accept_pause_s)
        super().wait_for_and_dispatch_events(timeout)

    def accept(self, listener: Any) -> None:
        """One connection, as gunicorn does; or all that came to a full house during a pause, ACCEPTED at most."""
        most = MAX_ACCEPTS if self.middleware.admission.is_at_capacity else 1
        for _ in range(min(most, self.worker_connections - self.nr_conns)):
            before = self.nr_conns
            super().accept(listener)
            if self.nr_conns == before:
                return

    def enqueue_req(self, conn: Any) -> None:
        """Something arrived, or will, on a connection that is new, or of which something is read already."""
        conn.place, conn.unwanted = None, 0
        refusal = self._look(conn)
        if refusal is None:
            super().enqueue_req(conn)
        elif refusal.keep:
            self.finish_request(conn, KEPT)
        else:
            self.close_gracefully(conn)

    def on_client_socket_readable(self, conn: Any, client: Any) -> None:
        """Something arrived on a connection that was kept. As long as all are refused on it, it stays in the poller."""
        if conn.unwanted:
            self._drop(conn)
            return
        refusal = self._look(conn)
        more = conn.parser.unreader.buf.getvalue()
        self.keepalived_conns.remove(conn)
        if refusal and refusal.keep and not more:
            conn.set_timeout()
            self.keepalived_conns.append(conn)
            return
        self.poller.unregister(client)
        if refusal and not refusal.keep:
            self.close_gracefully(conn)
        else:
            super().enqueue_req(conn)

    def handle(self, conn: Any) -> Any:
        try:
            return super().handle(conn)
        finally:
            if conn.place:  # it left before the gate
                conn.place.release()
            conn.place = None

    def handle_request(self, req: Any, conn: Any) -> Any:
        # An answer must say that it is the connection's last: what a client sends behind one that does not is lost.
        req.body.end_connection = req.force_close
        req.body.place = conn.place
        return super().handle_request(req, conn)

    def _look(self, conn: Any) -> RejectionResponse | None:
        """Refuse what arrived; or None, and it is in the parser, with a place in the house if it is known to need one."""
        if not (self.alive and self.middleware.admission.is_busy) or (conn.parser and conn.parser.unreader.buf.getvalue()):
            return None
        if not (size := self.receive(conn)):
            return None
        conn.init()
        head = self._plain_head(size)
        if head:
            conn.place = self.middleware.admission.try_acquire_slot()
        if not head or conn.place:
            conn.parser.unreader.unread(bytes(self.receive_buffer[:size]))
            return None
        request_id = head["id"] or uuid.uuid4().hex.encode()
        refusal = self._refusal(len(request_id), too_long=int(head["length"]) >= MAX_DRAIN_BYTES)
        end = head.end() + int(head["length"])
        if not self._say(conn, refusal.answer.replace(b"0" * len(request_id), request_id)):
            return refusal._replace(keep=False)
        if refusal.keep:
            conn.unwanted = max(0, end - size)
            conn.parser.unreader.unread(bytes(self.receive_buffer[end:size]))
        return refusal

    def _plain_head(self, size: int) -> re.Match[bytes] | None:
        """The head in ``receive_buffer``, of which ``size`` bytes are filled, if it is plain and names one length."""
        head = PLAIN.match(self.receive_buffer, 0, min(size, MAX_HEAD_BYTES))
        # Of two lengths, somebody else may believe the other.
        return head if head and head[0].lower().count(b"content-length") == 1 else None

    def _say(self, conn: Any, answer: bytes) -> bool:
        self.middleware.count_rejection()
        try:
            return conn.sock.send(answer, socket.MSG_DONTWAIT) == len(answer)
        except OSError:
            return False

    def _refusal(self, id_length: int, *, too_long: bool) -> RejectionResponse:
        """What the gate says to such a request, as gunicorn sends it. It is asked anew when that is FRESH_S old."""
        now, key = time.monotonic(), (too_long, id_length)
        if key not in self._refusals or now > self._refusals[key].until:
            head = SAMPLE % (b"0" * id_length, MAX_DRAIN_BYTES if too_long else 0)
            nobody = _Nobody()
            keep = self.handle_request(next(get_parser(self.cfg, [head], nobody.client)), nobody)
            self._refusals[key] = RejectionResponse(bytes(nobody.sock), keep, now + RESPONSE_MAX_AGE_S)
        return self._refusals[key]

    def _drop(self, conn: Any) -> None:
        """Throw away what still comes of a body that was refused."""
        got = self.receive(conn, conn.unwanted)
        conn.unwanted -= got or 0
        if got == 0:
            self.keepalived_conns.remove(conn)
            self.close_connection(conn)


class _Nobody:
    """A connection of nobody: to hear what would be said."""

    client = server = ("", 0)
    place = False

    def __init__(self) -> None:
        self.sock = SendBuffer()

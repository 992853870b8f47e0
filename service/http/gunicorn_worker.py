"""A gunicorn worker in which no thread ever waits for a client.

One event loop, in the worker's main thread, does all the waiting: it accepts connections, receives the heads and bodies of
requests, sends what the kernel did not take at once, and closes connections. A request takes a thread when it is complete, and
leaves it when its response is complete, or as soon as the client is slower than the application. So clients that are slow,
silent or do not read cost a connection each, and connections are bounded: see ``Timer`` for how long each may take for what,
and ``EventLoopWorker._make_room`` for which one is closed when there are too many.

Requests run in lanes (``Lane``), each with its own threads, so that pages cannot starve predictions, nor either of them probes.
A prediction that exceeds the server's capacity is rejected by the loop, after its head and before its body.

Plain HTTP/1.1 only: TLS and HTTP/2 end at the proxy. ``GUNICORN_WORKER=stock`` runs gunicorn's own threads instead.

What is used of gunicorn beyond its documented worker class, each held by tests/test_gunicorn_contract.py:

- ``http.get_parser(cfg, iterable, address)`` parses a head, and raises ``http.errors.NoMoreData`` where it is not complete;
- a request's ``body``, ``force_close()``, ``should_close()`` and ``_expected_100_continue``;
- ``http.wsgi.create`` makes the environment and the response, which writes to the given socket with ``sendall`` alone;
- a response's ``write``, ``close``, ``should_close``, ``force_close``, ``headers_sent``, ``sent`` and ``response_length``;
- ``Worker.handle_error`` answers 4xx and 5xx through the given socket; ``Worker.PIPE`` wakes the loop, on signals too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import resource
import selectors
import socket
import struct
import termios
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from gunicorn.http import get_parser, wsgi
from gunicorn.http.errors import LimitRequestHeaders, NoMoreData
from gunicorn.workers.base import Worker

from service.context import services_of
from service.http import REJECTION, SLOT

if TYPE_CHECKING:  # this module is imported before the fork: Flask must not be yet, nor prometheus_client without its folder
    from service.http.admission import Slot
    from service.http.errors import Problem
    from service.http.middleware import RequestMiddleware
    from service.settings import Settings

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
HEAD_CHUNK_BYTES, BODY_CHUNK_BYTES = 1 << 16, 1 << 18  # received in one go
MAX_HEAD_BYTES = 1 << 16
KEEP_READING_BYTES = 1 << 16  # of a rejected body, for the sake of the next request; with a longer one the connection ends
FLUSH_BYTES = 1 << 16
CONGESTED_BYTES = 1 << 18  # unsent bytes of a response, at which the application is not asked for more of it
MIN_SENT_BYTES = 1 << 14  # what a client has to take within SEND_TIMEOUT_S
MAX_CHUNKS = 100_000
MAX_CHUNK_LINE = 8190
ACCEPTED_AT_ONCE = 32
ACCEPT_PAUSE_S = 0.2
LINGER_S = 2.0
STOP_S = 2.0
TICK_S = 1.0
RESERVED_FILES = 128  # for the model, databases, photos and logs
PROBE_THREADS = 2
PROBES = re.compile(r"/health/.*|/metrics|/v2/health/.*|/v2/models/[^/]+(/versions/[^/]+)?/ready")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: drop unsent bytes, and reset the connection
PLAIN_ID = re.compile(r"[\w.:-]{16,64}", re.ASCII)
NOT_PLAIN = frozenset({"EXPECT", "ORIGIN", "SCRIPT_NAME", "TRANSFER-ENCODING"})  # what changes a rejection, or its path
LANE_FULL = "Too many requests are waiting for a thread; send it again in a moment."
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\r\n]*)?\r\n")


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit, and return how many connections that leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems refuse an unlimited one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else max(16, soft - RESERVED_FILES)


class Timer(Enum):
    """What the loop waits for a client to do, each for a time of its own (``EventLoopWorker._read_settings``)."""

    FIRST_BYTE = auto()
    HEAD = auto()
    BODY = auto()
    KEEPALIVE = auto()
    SEND = auto()
    LINGER = auto()
    STOP = auto()  # the request that may be under way when the worker has to stop


# In which order connections are closed when there are too many: in each group, the one that has waited longest.
EVICTION_ORDER = (Timer.FIRST_BYTE, Timer.KEEPALIVE, Timer.STOP, Timer.LINGER, Timer.HEAD, Timer.SEND, Timer.BODY)


class State(Enum):
    """What a connection is doing."""

    HEAD = auto()  # waiting for a request, or receiving its head
    BODY = auto()  # receiving a request's body
    QUEUED = auto()  # has received bytes that the loop's next turn looks at
    RUNNING = auto()  # in a lane
    SENDING = auto()  # sending what the kernel did not take at once
    LINGERING = auto()  # done; reads until the client has closed, as closing with unread bytes would reset the response
    CLOSED = auto()


class Outcome(Enum):
    """How a thread left a response."""

    COMPLETE = auto()
    PAUSED = auto()  # the application has more, and goes on when the client has taken what there is
    FAILED = auto()


class DisconnectedError(Exception):
    """The client is gone."""


class ResponseWriter:
    """The socket that gunicorn's response writes to. It never waits: what the kernel does not take is kept."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._chunks: list[bytes | memoryview] = []
        self.unsent = 0
        self.sent = 0

    @property
    def is_congested(self) -> bool:
        return self.unsent >= CONGESTED_BYTES

    def sendall(self, data: bytes) -> None:
        """Keep ``data`` until a good number of bytes are there: a head leaves together with its body."""
        self._chunks.append(data)
        self.unsent += len(data)
        if self.unsent >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send as much as the kernel takes. Raises DisconnectedError where it cannot be sent."""
        if not self.unsent:
            return
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise DisconnectedError from error
        self.sent += sent
        self.unsent -= sent
        self._chunks = [memoryview(data)[sent:]] if self.unsent else []

    def recv(self, size: int, flags: int) -> bytes:
        """Look whether the client is there (``service.http.uploads``)."""
        return self._sock.recv(size, flags)

    def gettimeout(self) -> float:
        return 0.0

    def delivered(self) -> int:
        """Return how many bytes the client has acknowledged."""
        try:
            (waiting,) = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, b"\0" * 4))
        except OSError:  # not of a TCP socket; then what the kernel took counts
            waiting = 0
        return self.sent - waiting


class Recorder(bytearray):
    """A socket that keeps what it is given."""

    sendall = bytearray.extend


class ChunkScanner:
    """Find where a chunked body ends, without decoding it: gunicorn's reader does that when it need not wait for more."""

    def __init__(self) -> None:
        self.size = 0  # decoded, as announced so far
        self.chunks = 0
        self._position = 0
        self._trailer: int | None = None

    def find_end(self, body: bytearray) -> int | None:
        """Return the length of the complete body, or of one that is malformed, as that will not become right; else None."""
        while self._trailer is None:
            start = self._position
            if self.chunks:
                if len(body) < start + 2:
                    return None
                if body[start : start + 2] != b"\r\n":
                    return len(body)
                start += 2
            line = CHUNK_LINE.match(body, start)
            if line is None:
                is_malformed = len(body) - start > MAX_CHUNK_LINE or body.find(b"\n", start) >= 0
                return len(body) if is_malformed else None
            size = int(line[1], 16)
            self._position = line.end() + size
            self.size += size
            self.chunks += 1
            if size == 0:
                self._trailer = line.end()
            if self._position > len(body):
                return None
        if body[self._trailer : self._trailer + 2] == b"\r\n":
            return self._trailer + 2
        end = body.find(b"\r\n\r\n", self._trailer)
        if end >= 0:
            return end + 4
        return len(body) if len(body) - self._trailer > MAX_HEAD_BYTES else None


@dataclass(eq=False)
class Exchange:
    """A request and its response. ``length`` is that of its body; None for one in chunks."""

    request: Any
    response: Any
    environ: dict[str, Any]
    writer: ResponseWriter
    source: list[bytes]  # what gunicorn's reader of chunks reads
    length: int | None
    is_prediction: bool
    scanner: ChunkScanner = field(default_factory=ChunkScanner)
    body: bytes = b""
    slot: Slot | None = None
    lane: Lane | None = None
    iterable: Any = None
    iterator: Iterator[bytes] | None = None
    context: Context = field(default_factory=Context)  # a response that pauses may go on in another thread
    delivered: int = 0


class Connection:
    """A client's connection. All but the exchange that runs belongs to the loop."""

    def __init__(self, sock: socket.socket, client: Any, server: Any) -> None:
        self.sock, self.client, self.server = sock, client, server
        self.state = State.HEAD
        self.buffer = bytearray()  # received, and neither a request yet nor thrown away
        self.scanned = 0  # bytes of it in which no head ends
        self.discard = 0  # bytes of a rejected body that are still to come
        self.exchange: Exchange | None = None
        self.timer: Timer | None = None
        self.events = 0
        self.is_half_closed = False  # the client sends nothing more


class Lane:
    """A number of threads, and a queue of bounded length in front of them. Used by the loop alone."""

    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        self.name, self.max_waiting = name, max_waiting
        self.free = threads
        self.waiting: deque[Connection] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    @property
    def is_at_capacity(self) -> bool:
        return not self.free and len(self.waiting) >= self.max_waiting

    def run(self, work: Any, connection: Connection) -> None:
        self.free -= 1
        self._pool.submit(work, connection)

    def clean_up(self, work: Any, *args: Any) -> None:
        """Have a thread do what must not hold up the loop."""
        self._pool.submit(work, *args)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class EventLoopWorker(Worker):
    """See the module's docstring. Methods whose names begin with ``_run`` are a thread's; all others are the loop's."""

    _gate: RequestMiddleware
    _settings: Settings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._selector: selectors.BaseSelector
        self._connections: set[Connection] = set()
        self._timers: dict[Timer, dict[Connection, float]] = {timer: {} for timer in Timer}  # each in the order of its ends
        self._queued: deque[Connection] = deque()
        self._finished: deque[tuple[Connection, Outcome]] = deque()
        self._room = memoryview(bytearray(BODY_CHUNK_BYTES))
        self._accepts_from: float | None = 0.0  # None while it accepts; else when it may again
        self._buffered = 0  # bytes received of requests that do not run yet
        self._unsent = 0  # bytes of responses that wait for clients
        self._next_tick = 0.0
        self._templates: dict[Any, bytes] = {}
        self._template_problem: Problem | None = None

    # The worker's life

    def run(self) -> None:
        """Serve until the worker has to stop, then finish what was accepted. Called by gunicorn."""
        self._read_settings()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.PIPE[0], READ, self._drain_pipe)
        while self.alive:
            self._turn()
            if self.ppid != os.getppid():
                self.log.info("Parent changed, shutting down: %s", self)
                break
        self._stop()
        for lane in (self._predictions, self._pages, self._probes):
            lane.close()
        self._selector.close()

    def _read_settings(self) -> None:
        services = services_of(self.wsgi)
        self._settings = settings = services.settings
        assert services.middleware is not None
        self._gate = services.middleware
        self._seconds = {
            Timer.FIRST_BYTE: settings.first_byte_timeout_s,
            Timer.HEAD: settings.head_timeout_s,
            Timer.BODY: settings.body_timeout_s,
            Timer.KEEPALIVE: settings.keepalive_s,
            Timer.SEND: settings.send_timeout_s,
            Timer.LINGER: LINGER_S,
            Timer.STOP: STOP_S,
        }
        self._max_buffered = int(settings.max_buffered_mb * (1 << 20))
        threads, waiting = self.cfg.threads, settings.page_queue
        self._predictions = Lane("predict", min(threads, settings.max_in_flight), settings.max_in_flight)
        self._pages = Lane("page", settings.page_threads or max(1, threads // 4), waiting)
        self._probes = Lane("probe", PROBE_THREADS, waiting)

    def _stop(self) -> None:
        """Accept the connections in the backlog, stop listening, and finish what was begun, within SHUTDOWN_TIMEOUT_S."""
        until = time.monotonic() + self.cfg.graceful_timeout
        self.alive = False
        self._accept_all()
        self._set_accepting(False)
        for listener in self.sockets:
            listener.close()
        for timer in (Timer.FIRST_BYTE, Timer.KEEPALIVE):  # a request may be under way on them; each gets a moment
            for connection in list(self._timers[timer]):
                self._set_timer(connection, Timer.STOP)
        while self._connections and time.monotonic() < until:
            self._turn()
        for connection in list(self._connections):
            self._close(connection)

    def _turn(self) -> None:
        """Wait for the next events, and do what is due."""
        now = time.monotonic()
        if now >= self._next_tick:
            self.notify()  # gunicorn's heartbeat
            self._gate.metrics.connections.set(len(self._connections))
            self._next_tick = now + TICK_S
        if self.alive:
            may_accept = len(self._connections) < self.cfg.worker_connections or self._can_make_room()
            self._set_accepting(may_accept and (self._accepts_from is None or now >= self._accepts_from))
        if self.alive and (pause_s := self._gate.admission.accept_pause_s):
            # At capacity, to be woken for each request costs more than to reject it; so let several come.
            time.sleep(pause_s)
        ready = self._selector.select(self._timeout(now))
        self._collect()  # first: a connection whose response is complete may have its next request
        for key, events in ready:
            key.data(events)
        for _ in range(len(self._queued)):
            self._guard(self._queued.popleft(), self._advance)
        self._expire(time.monotonic())

    def _timeout(self, now: float) -> float:
        if self._queued or self._finished:
            return 0.0
        ends = [next(iter(waiting.values())) for waiting in self._timers.values() if waiting]
        ends += [self._next_tick, *([self._accepts_from] if self._accepts_from else [])]
        return max(0.0, min(ends) - now)

    def _drain_pipe(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.PIPE[0], 4096)

    def _guard(self, connection: Connection, step: Any) -> None:
        """Do one step for a connection: an error in it ends that connection, and nothing else."""
        if connection.state is State.CLOSED:
            return
        try:
            step(connection)
        except DisconnectedError:
            self._close(connection)
        except Exception:
            self.log.exception("Error in a connection")
            self._close(connection)

    # Connections

    def _set_accepting(self, accepting: bool) -> None:
        if accepting == (self._accepts_from is None):
            return
        for listener in self.sockets:
            if accepting:
                listener.setblocking(False)
                self._selector.register(listener, READ, partial(self._accept, listener))
            else:
                self._selector.unregister(listener)
        self._accepts_from = None if accepting else 0.0

    def _accept_all(self) -> None:
        for listener in self.sockets:
            listener.setblocking(False)
            while self._accept_one(listener):
                pass

    def _accept(self, listener: Any, _: int) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            if not self._accept_one(listener):
                return

    def _accept_one(self, listener: Any) -> bool:
        is_at_capacity = len(self._connections) >= self.cfg.worker_connections
        if is_at_capacity and not self._can_make_room():
            return False
        try:
            sock, client = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._gate.metrics.connections_cut.labels("file_limit").inc()
                self._make_room()
                if self._accepts_from is None:
                    self._set_accepting(False)
                    self._accepts_from = time.monotonic() + ACCEPT_PAUSE_S
            # Anything else is that client's: it may have gone before it was accepted.
            return error.errno == errno.ECONNABORTED
        if is_at_capacity:
            self._make_room()
        sock.setblocking(False)
        connection = Connection(sock, client, listener.getsockname())
        self._connections.add(connection)
        self._set_timer(connection, Timer.FIRST_BYTE if self.alive else Timer.STOP)
        self._listen(connection, READ)
        self._guard(connection, self._receive)  # most have sent a request by now
        return True

    def _can_make_room(self) -> bool:
        return any(self._timers[timer] for timer in EVICTION_ORDER)

    def _make_room(self) -> None:
        """Close the connection that has waited longest for its client, of those that matter least."""
        for timer in EVICTION_ORDER:
            if waiting := self._timers[timer]:
                self._cut(next(iter(waiting)), "connection_limit")
                return

    def _listen(self, connection: Connection, events: int) -> None:
        """Wait for ``events`` of the connection, or for none. selectors knows no entry without events."""
        if events == connection.events:
            return
        if not events:
            self._selector.unregister(connection.sock)
        elif connection.events:
            self._selector.modify(connection.sock, events, partial(self._on_event, connection))
        else:
            self._selector.register(connection.sock, events, partial(self._on_event, connection))
        connection.events = events

    def _on_event(self, connection: Connection, events: int) -> None:
        if connection.state in (State.HEAD, State.BODY, State.LINGERING):
            self._guard(connection, self._receive)
        elif connection.state is State.SENDING:
            self._guard(connection, self._send)
        else:  # it sends ahead of its turn, or has gone
            self._listen(connection, 0)

    def _set_timer(self, connection: Connection, timer: Timer | None) -> None:
        if connection.timer:
            del self._timers[connection.timer][connection]
        connection.timer = timer
        if timer:
            self._timers[timer][connection] = time.monotonic() + self._seconds[timer]

    def _expire(self, now: float) -> None:
        for timer, waiting in self._timers.items():
            while waiting:
                connection, end = next(iter(waiting.items()))
                if end > now:
                    break
                if timer is Timer.SEND and self._is_taking(connection):
                    self._set_timer(connection, Timer.SEND)
                elif timer is Timer.BODY and connection.exchange:
                    self._gate.metrics.connections_cut.labels("body_timeout").inc()
                    self._set_timer(connection, None)
                    self._guard(connection, self._give_up_body)
                elif timer in (Timer.KEEPALIVE, Timer.LINGER, Timer.STOP):
                    self._close(connection)
                else:
                    self._cut(connection, f"{timer.name.lower()}_timeout")

    def _cut(self, connection: Connection, reason: str) -> None:
        """Close a connection that the server cannot or will not wait for; unsent bytes are dropped."""
        self._gate.metrics.connections_cut.labels(reason).inc()
        if connection.state is State.SENDING:
            with contextlib.suppress(OSError):
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        if connection.state is State.CLOSED:
            return
        self._set_timer(connection, None)
        self._listen(connection, 0)
        self._drop_buffer(connection)
        exchange, connection.exchange = connection.exchange, None
        if exchange:
            if connection.state is State.SENDING:
                self._unsent -= exchange.writer.unsent
            if exchange.slot:
                exchange.slot.release()
            if exchange.iterator and hasattr(exchange.iterable, "close") and connection.state is State.SENDING:
                self._pages.clean_up(exchange.context.run, exchange.iterable.close)
        connection.state = State.CLOSED
        self._connections.discard(connection)
        connection.sock.close()

    def _part(self, connection: Connection) -> None:
        """Say that nothing follows, and read on until the client closes: else a reset could overtake the response."""
        connection.exchange = None
        self._drop_buffer(connection)
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:  # it is gone already
            self._close(connection)
            return
        if connection.is_half_closed:
            self._close(connection)
            return
        connection.state = State.LINGERING
        self._set_timer(connection, Timer.LINGER)
        self._listen(connection, READ)

    # Requests

    def _receive(self, connection: Connection) -> None:
        room = self._room if connection.state is State.BODY else self._room[:HEAD_CHUNK_BYTES]
        try:
            size = connection.sock.recv_into(room)
        except BlockingIOError:
            return
        except OSError as error:
            raise DisconnectedError from error
        if size == 0:
            self._end_of_input(connection)
        elif connection.state is not State.LINGERING:
            if connection.timer in (Timer.FIRST_BYTE, Timer.KEEPALIVE, Timer.STOP):
                self._set_timer(connection, None)
            connection.buffer += room[:size]
            self._count_buffered(size)
            self._advance(connection)
            if self._buffered > self._max_buffered:
                self._free_buffers()

    def _end_of_input(self, connection: Connection) -> None:
        """The client has closed, or at least will send nothing more."""
        connection.is_half_closed = True
        if connection.state is State.BODY and connection.exchange:
            length, there = connection.exchange.length, len(connection.buffer)
            announced = "The body broke off" if length is None else f"{length:,} bytes were announced and {there:,} arrived"
            self._reject(connection, self._problem("bad_request", f"{announced}; send it again."), ends=True)
        else:
            self._close(connection)

    def _advance(self, connection: Connection) -> None:
        """Go on with what was received: at most one request, so that a long row of them holds up nobody else."""
        connection.state = State.BODY if connection.exchange else State.HEAD
        if connection.discard:
            size = min(connection.discard, len(connection.buffer))
            connection.discard -= size
            del connection.buffer[:size]
            self._count_buffered(-size)
            if connection.discard:
                self._listen(connection, READ)
                return
            self._set_timer(connection, None)
        if connection.exchange:
            self._receive_body(connection)
            return
        if connection.buffer:
            self._read_head(connection)
        if connection.state is State.HEAD:
            if connection.timer is None:
                self._set_timer(connection, Timer.HEAD if connection.buffer else self._idle)
            self._listen(connection, READ)

    @property
    def _idle(self) -> Timer:
        return Timer.KEEPALIVE if self.alive else Timer.STOP

    def _read_head(self, connection: Connection) -> None:
        """Begin with the request whose head is there, or go on waiting for it. gunicorn's parser is the one judge of heads."""
        buffer, scanned = connection.buffer, connection.scanned
        end = buffer.find(b"\r\n\r\n", max(0, scanned - 3))
        if end < 0:
            # What cannot become a head is not waited for: a line that does not end, or ends with a bare LF.
            new = buffer[max(0, scanned - 1) :]
            is_odd = new.count(b"\n") != new.count(b"\r\n") or len(buffer) // 4096 != scanned // 4096
            connection.scanned = len(buffer)
            if not is_odd:
                return
        source = [bytes(buffer[: end + 4] if end >= 0 else buffer)]
        writer = ResponseWriter(connection.sock)
        request = None
        try:
            if len(source[0]) > MAX_HEAD_BYTES:
                raise LimitRequestHeaders("max buffer headers")
            request = next(get_parser(self.cfg, iter_of(source), connection.client))
            if self._gate.admission.is_at_capacity and self._reject_from_template(connection, request, end + 4):
                return
            expects_continue, request._expected_100_continue = request._expected_100_continue, False
            response, environ = wsgi.create(request, writer, connection.client, connection.server, self.cfg)
        except (NoMoreData, StopIteration):
            return
        except Exception as error:
            self._gate.metrics.requests_rejected.labels("invalid_head").inc()
            self.handle_error(request, writer, connection.client, error)
            writer.flush()
            self._set_timer(connection, None)
            self._part(connection)
            return
        connection.scanned = 0
        self._take(connection, end + 4)
        environ["wsgi.multithread"] = True
        self._gate.begin(environ)
        length = None if "HTTP_TRANSFER_ENCODING" in environ else int(environ.get("CONTENT_LENGTH", 0))
        is_prediction = self._gate.is_prediction(environ)
        connection.exchange = Exchange(request, response, environ, writer, source, length, is_prediction)
        self._begin(connection, connection.exchange, expects_continue=expects_continue)

    def _begin(self, connection: Connection, exchange: Exchange, *, expects_continue: bool) -> None:
        """Reject the request before its body, or receive that."""
        connection.state = State.BODY
        self._set_timer(connection, None)
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("Autorestarting worker after current request.")
            self.alive = False
        if not self.alive:
            exchange.response.force_close()
        if exchange.is_prediction and self._gate.admission.is_at_capacity:
            self._gate.metrics.requests_rejected.labels("at_capacity").inc()
            self._reject(connection, self._gate.overloaded(), ends=expects_continue)
        elif exchange.length is not None and exchange.length > self._settings.max_body_bytes:
            exchange.response.force_close()  # before the application says it in its words
            self._dispatch(connection)
        else:
            if expects_continue and not connection.buffer:
                with contextlib.suppress(OSError):  # 25 bytes into an empty buffer; that a client is gone is found later
                    connection.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._receive_body(connection)

    def _receive_body(self, connection: Connection) -> None:
        exchange = connection.exchange
        assert exchange
        if (size := exchange.length) is None:
            scanner, limit = exchange.scanner, self._settings.max_body_bytes
            size = scanner.find_end(connection.buffer)
            is_padded = scanner.chunks > MAX_CHUNKS or len(connection.buffer) > 2 * limit + MAX_HEAD_BYTES
            if scanner.size > limit or is_padded:
                what = f"More than {limit:,} bytes" if scanner.size > limit else "Too many or too small chunks"
                detail = f"{what} arrived and {limit:,} is the most; send fewer or smaller photos."
                self._reject(connection, self._problem("body_too_large", detail), ends=True)
                return
        if size is None or size > len(connection.buffer):
            connection.state = State.BODY
            if connection.timer is None:
                self._set_timer(connection, Timer.BODY)
            self._listen(connection, READ)
            return
        self._set_timer(connection, None)
        exchange.body = self._take(connection, size)
        self._dispatch(connection)

    def _dispatch(self, connection: Connection) -> None:
        """Have a thread run the request, now or when one is free."""
        exchange = connection.exchange
        assert exchange
        environ = exchange.environ
        if exchange.is_prediction and REJECTION not in environ:
            exchange.slot = environ[SLOT] = self._gate.admission.try_acquire_slot()
            if not exchange.slot:
                self._gate.metrics.requests_rejected.labels("at_capacity").inc()
                self._reject(connection, self._gate.overloaded())
                return
            lane = self._predictions
        else:
            lane = self._probes if PROBES.fullmatch(environ["PATH_INFO"]) else self._pages
        if lane.is_at_capacity or (not lane.free and self._buffered + len(exchange.body) > self._max_buffered):
            self._gate.metrics.requests_rejected.labels(f"{lane.name}_queue_full").inc()
            self._reject(connection, self._problem("overloaded", LANE_FULL, {"Retry-After": "1"}), in_loop=True)
            return
        connection.state, exchange.lane = State.RUNNING, lane
        if lane.free:
            lane.run(self._run, connection)
        else:
            self._count_buffered(len(exchange.body))
            lane.waiting.append(connection)

    def _reject(self, connection: Connection, problem: Problem, *, ends: bool = False, in_loop: bool = False) -> None:
        """Answer with ``problem`` in place of the application, except where that has its own form for it.

        What is missing of a short body is thrown away as it comes; with a longer one, or with ``ends``, the connection ends.
        """
        exchange = connection.exchange
        assert exchange
        self._set_timer(connection, None)
        if exchange.slot:
            exchange.slot.release()
            exchange.slot = exchange.environ[SLOT] = None
        if exchange.body or exchange.length == 0:
            missing = 0
        elif exchange.length is None or exchange.length >= KEEP_READING_BYTES:
            missing, ends = 0, True
        else:
            missing = exchange.length
        if ends:
            exchange.response.force_close()
        else:
            connection.discard = missing
        exchange.environ[REJECTION] = problem
        if not in_loop and self._gate.has_own_rejections(exchange.environ):
            self._dispatch(connection)
            return
        exchange.environ["wsgi.input"] = BytesIO()
        connection.state = State.RUNNING
        for chunk in self._gate.respond(exchange.environ, exchange.response.start_response):
            exchange.response.write(chunk)
        exchange.response.close()
        exchange.writer.flush()
        self._go_on(connection, Outcome.COMPLETE)

    def _reject_from_template(self, connection: Connection, request: Any, head_bytes: int) -> bool:
        """Reject a plain POST /predict with what ``_reject`` would send, for half of the work: a flood consists of these."""
        if request.method != "POST" or request.path != "/predict" or not self.alive:
            return False
        length, request_id = 0, ""
        for name, value in request.headers:
            if name == "CONTENT-LENGTH":
                length = int(value)
            elif name == "X-REQUEST-ID":
                request_id = value if not request_id and PLAIN_ID.fullmatch(value) else "?"
            elif name in NOT_PLAIN:
                return False
        if request_id == "?":
            return False
        if closes := length >= KEEP_READING_BYTES:
            request.force_close()
        request_id = request_id or uuid.uuid4().hex
        response = self._template(request, len(request_id)).replace(b"0" * len(request_id), request_id.encode())
        self._gate.count_overloaded()
        self._set_timer(connection, None)
        connection.scanned = 0
        self._take(connection, head_bytes)
        try:
            sent = connection.sock.send(response)
        except OSError as error:  # also where the kernel has no room for it: then the client does not read what it asked for
            raise DisconnectedError from error
        if sent < len(response):
            raise DisconnectedError
        if closes or request.should_close():
            self._part(connection)
        else:
            connection.discard = length
            self._keep(connection)
        return True

    def _template(self, request: Any, id_length: int) -> bytes:
        """Return the rejection of such a request, with zeros for its id; made anew as often as its problem."""
        problem, key = self._gate.overloaded(), (request.version, request.should_close(), id_length)
        if problem is not self._template_problem:
            self._template_problem, self._templates = problem, {}
        if key not in self._templates:
            recorder = Recorder()
            response, environ = wsgi.create(request, recorder, ("", 0), ("", 0), self.cfg)
            environ |= {"HTTP_X_REQUEST_ID": "0" * id_length, REJECTION: problem}
            self._gate.begin(environ)
            for chunk in self._gate.respond(environ, response.start_response, counts=False):
                response.write(chunk)
            response.close()
            self._templates[key] = bytes(recorder)
        return self._templates[key]

    def _give_up_body(self, connection: Connection) -> None:
        detail = f"The body had not arrived whole within {self._settings.body_timeout_s:g} s; send it again."
        self._reject(connection, self._problem("body_timeout", detail), ends=True)

    def _problem(self, code: str, detail: str, headers: dict[str, str] | None = None) -> Problem:
        from service.http.errors import Problem

        return Problem(code, detail, headers=headers)

    # What has been received and does not run yet is bounded in total

    def _count_buffered(self, more: int) -> None:
        self._buffered += more

    def _take(self, connection: Connection, size: int) -> bytes:
        buffer = connection.buffer
        with memoryview(buffer) as view:
            taken = bytes(view[:size])
        del buffer[:size]
        self._count_buffered(-size)
        return taken

    def _drop_buffer(self, connection: Connection) -> None:
        self._count_buffered(-len(connection.buffer))
        connection.buffer.clear()

    def _free_buffers(self) -> None:
        """Cut the requests that have been arriving for longest, until the rest fits."""
        for timer in (Timer.BODY, Timer.HEAD):
            while self._buffered > self._max_buffered and self._timers[timer]:
                self._cut(next(iter(self._timers[timer])), "buffer_limit")

    # Responses

    def _run(self, connection: Connection) -> None:
        """Run the application for a request, or go on with its response. In a lane's thread."""
        exchange = connection.exchange
        assert exchange
        outcome = Outcome.FAILED
        try:
            outcome = exchange.context.run(self._run_application, connection.client, exchange)
        except BaseException:
            self.log.exception("Error handling request")
        self._finished.append((connection, outcome))
        # The loop need not be woken for a connection that it listens to anyway.
        is_quiet = outcome is Outcome.COMPLETE and connection.events == READ and not exchange.writer.unsent
        if not is_quiet or exchange.response.should_close() or connection.buffer or exchange.lane.waiting or not self.alive:  # type: ignore[union-attr]
            self._wake()

    def _run_application(self, client: Any, exchange: Exchange) -> Outcome:
        response, writer = exchange.response, exchange.writer
        outcome = Outcome.FAILED
        try:
            if exchange.iterator is None:
                exchange.iterable = self._run_request(exchange)
                exchange.iterator = iter(exchange.iterable)
            for chunk in exchange.iterator:
                response.write(chunk)
                is_all = response.response_length is not None and response.sent >= response.response_length
                if writer.is_congested and not is_all:
                    outcome = Outcome.PAUSED
                    return outcome
            response.close()
            writer.flush()
            outcome = Outcome.COMPLETE
        except DisconnectedError:
            self.log.debug("The client closed the connection")
        except Exception as error:
            if response.headers_sent:  # all that is left to say is that it is not complete
                self.log.exception("Error handling request")
            else:
                response.force_close()
                self.handle_error(exchange.request, writer, client, error)
                with contextlib.suppress(DisconnectedError):
                    writer.flush()
                    outcome = Outcome.COMPLETE
        finally:
            if outcome is not Outcome.PAUSED:
                if hasattr(exchange.iterable, "close"):
                    exchange.iterable.close()
                if exchange.slot:
                    exchange.slot.release()
                exchange.environ.pop("wsgi.input", None)  # the loop may see to the exchange a second later
                exchange.source.clear()
        return outcome

    def _run_request(self, exchange: Exchange) -> Iterable[bytes]:
        environ, application = exchange.environ, self.wsgi
        if exchange.length is None and REJECTION not in environ:
            exchange.source.append(exchange.body)
            try:
                exchange.body = exchange.request.body.read()
            except Exception as error:  # gunicorn raises what it likes on chunks that are malformed
                problem = self._problem("bad_request", f"The body could not be read ({error!r}); send it again.")
                exchange.response.force_close()
                environ[REJECTION] = problem
                if not self._gate.has_own_rejections(environ):
                    application = self._gate.respond
        environ["wsgi.input"] = BytesIO(exchange.body)
        exchange.body = b""
        result: Iterable[bytes] = application(environ, exchange.response.start_response)
        return result

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # enough wake-ups are on their way
            os.write(self.PIPE[1], b"\0")

    def _collect(self) -> None:
        """Take over the connections that threads are done with, and give threads to the next ones."""
        while self._finished:
            connection, outcome = self._finished.popleft()
            exchange = connection.exchange
            assert exchange
            assert exchange.lane
            lane = exchange.lane
            lane.free += 1
            self._guard(connection, partial(self._go_on, outcome=outcome))
            while lane.free and lane.waiting:
                waiting = lane.waiting.popleft()
                assert waiting.exchange
                if not waiting.exchange.iterator:
                    self._count_buffered(-len(waiting.exchange.body))
                lane.run(self._run, waiting)

    def _go_on(self, connection: Connection, outcome: Outcome) -> None:
        """Go on with a connection whose response is complete, or as complete as it can be by now."""
        exchange = connection.exchange
        assert exchange
        if outcome is Outcome.FAILED:
            self._close(connection)
        elif exchange.writer.unsent or outcome is Outcome.PAUSED:
            if outcome is Outcome.COMPLETE:
                exchange.iterator = None
            connection.state = State.SENDING
            self._unsent += exchange.writer.unsent
            exchange.delivered = exchange.writer.delivered()
            self._set_timer(connection, Timer.SEND)
            self._listen(connection, WRITE)
            while self._unsent > self._max_buffered and self._timers[Timer.SEND]:
                self._cut(next(iter(self._timers[Timer.SEND])), "buffer_limit")
        elif exchange.response.should_close():
            self._part(connection)
        else:
            self._keep(connection)

    def _send(self, connection: Connection) -> None:
        exchange = connection.exchange
        assert exchange
        before = exchange.writer.unsent
        exchange.writer.flush()
        self._unsent += exchange.writer.unsent - before
        if exchange.writer.unsent:
            return
        self._set_timer(connection, None)
        self._listen(connection, 0)
        if exchange.iterator is None:
            self._go_on(connection, Outcome.COMPLETE)
            return
        assert exchange.lane
        connection.state = State.RUNNING
        if exchange.lane.free:
            exchange.lane.run(self._run, connection)
        else:
            exchange.lane.waiting.append(connection)

    def _is_taking(self, connection: Connection) -> bool:
        """Whether the client took some of its response while the timer ran: what it acknowledged counts."""
        exchange = connection.exchange
        assert exchange
        before, exchange.delivered = exchange.delivered, exchange.writer.delivered()
        return exchange.delivered - before >= MIN_SENT_BYTES

    def _keep(self, connection: Connection) -> None:
        """Wait for the connection's next request."""
        connection.exchange = None
        if connection.discard:
            self._set_timer(connection, Timer.BODY)
        if connection.buffer:
            connection.state = State.QUEUED
            self._queued.append(connection)
            return
        connection.state = State.HEAD
        if not connection.discard:
            self._set_timer(connection, self._idle)
        self._listen(connection, READ)


def iter_of(source: list[bytes]) -> Iterator[bytes]:
    """Iterate over a list that may grow: gunicorn takes an iterable for the socket."""
    position = 0
    while True:
        if position < len(source):
            yield source[position]
            position += 1
        else:
            yield b""

"""A gunicorn worker in which no thread waits for a client.

One event loop in the worker's main thread does all waiting: it accepts connections, receives heads and bodies, sends
what did not fit into the kernel's send buffer, and closes connections. A request occupies a thread from when its body
is complete until its response is complete, or until the client reads more slowly than the application writes. Slow,
silent and unread clients therefore cost one connection each, and connections are bounded: ``Timer`` lists how long each
may take for what, and ``EventLoopWorker._evict`` closes one when there are too many.

Requests run in lanes (``Lane``) with threads of their own, so that pages cannot starve predictions, nor either of them
probes. The loop rejects a prediction above the server's capacity after its head and before its body.

Plain HTTP/1.1 only: a proxy terminates TLS and HTTP/2. ``GUNICORN_WORKER=stock`` runs gunicorn's threaded worker instead.

Internals of gunicorn that are used beyond its documented worker class, each with a contract test
(tests/service/http/test_gunicorn_contract.py):

- ``http.get_parser(cfg, iterable, address)`` parses a head and raises ``http.errors.NoMoreData`` if it is incomplete.
- A request has ``method``, ``path``, ``version``, ``headers``, ``body``, ``force_close()``, ``should_close()`` and
  ``_expected_100_continue``.
- ``http.wsgi.create`` makes the environment and a response that writes to the given socket only by ``sendall``.
- A response has ``write``, ``close``, ``should_close``, ``force_close``, ``headers_sent``, ``sent`` and ``response_length``.
- ``http.errors.InvalidHeader`` and ``LimitRequestHeaders`` become 400 and 431 in ``Worker.handle_error``, which writes to the
  given socket.
- ``Worker.PIPE`` wakes the loop, also on signals.
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
from gunicorn.http.errors import InvalidHeader, LimitRequestHeaders, NoMoreData
from gunicorn.workers.base import Worker

from service.context import services_of
from service.http import IMAGE_PATHS, PROBE_PATHS, REJECTION, SLOT
from service.http.errors import Problem
from service.http.request_body import body_incomplete, body_malformed, body_timeout, body_too_large

if TYPE_CHECKING:  # imported before the fork, when prometheus_client must not be loaded yet
    from service.http.admission import Slot
    from service.http.middleware import RequestMiddleware
    from service.settings import Settings

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
RECEIVE_BYTES = 1 << 18
MAX_HEAD_BYTES = 1 << 16
MAX_DISCARDED_BYTES = 1 << 16  # of a rejected body, to keep the connection; with a longer one the connection is closed
FLUSH_BYTES = 1 << 16
CONGESTED_BYTES = 1 << 18  # unsent bytes at which a response pauses
MIN_SENT_BYTES = 1 << 14  # what a client has to read within SEND_TIMEOUT_S
MAX_CHUNKS = 100_000
MAX_CHUNK_LINE = 8190
ACCEPTED_AT_ONCE = 32
ACCEPT_PAUSE_S = 0.2  # after the process ran out of files
LINGER_S = 2.0
STOP_S = 2.0
TICK_S = 1.0
RESERVED_FILES = 128  # for the model, databases, photos and logs
PROBE_THREADS = 2
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: drop unsent bytes and reset the connection
# Headers that change a rejection: a request with one of them is not rejected from the template.
NOT_PLAIN = frozenset({"EXPECT", "ORIGIN", "TRANSFER-ENCODING", "X-REQUEST-ID"})
TEMPLATE_ID = "0" * 32
LANE_FULL = "Too many requests are waiting. Retry in a moment."
BARE_LF = re.compile(rb"(?<!\r)\n")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\r\n]*)?\r\n")


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit, and return the number of connections that leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems reject an unlimited one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else max(16, soft - RESERVED_FILES)


class Timer(Enum):
    """What the loop waits for a client to do. ``EventLoopWorker._configure`` sets the time for each."""

    FIRST_BYTE = auto()
    HEAD = auto()
    BODY = auto()
    KEEPALIVE = auto()
    SEND = auto()
    LINGER = auto()
    STOP = auto()  # a request that may be on its way when the worker stops


# The order in which connections are closed when there are too many. Within a group, the longest waiting one is closed.
EVICTION_ORDER = (Timer.FIRST_BYTE, Timer.KEEPALIVE, Timer.STOP, Timer.LINGER, Timer.HEAD, Timer.SEND, Timer.BODY)


class State(Enum):
    """What a connection is doing."""

    RECEIVING = auto()
    QUEUED = auto()  # has received bytes, which the next turn of the loop processes
    RUNNING = auto()  # in a lane
    SENDING = auto()
    LINGERING = auto()  # reads until the client closes: closing with unread bytes would reset the response
    CLOSED = auto()


class Outcome(Enum):
    """How a thread left a response."""

    COMPLETE = auto()
    PAUSED = auto()  # continues when the client has read what is there
    FAILED = auto()


class DisconnectedError(Exception):
    """The client closed the connection."""


class ResponseWriter:
    """The socket that gunicorn's response writes to. It never blocks: it keeps what the kernel does not take."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._chunks: list[bytes | memoryview] = []
        self.unsent = 0
        self.sent = 0

    @property
    def is_congested(self) -> bool:
        return self.unsent >= CONGESTED_BYTES

    def sendall(self, data: bytes) -> None:
        """Buffer small writes, so that a head leaves together with its body."""
        self._chunks.append(data)
        self.unsent += len(data)
        if self.unsent >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send as much as the kernel takes. Raises DisconnectedError if the client is gone."""
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
        """Check whether the client is connected (``service.http.uploads.is_client_connected``)."""
        return self._sock.recv(size, flags)

    def gettimeout(self) -> float:
        return 0.0

    def delivered(self) -> int:
        """Return the number of bytes that the client has acknowledged."""
        try:
            (waiting,) = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, b"\0" * 4))
        except OSError:  # not a TCP socket
            waiting = 0
        return self.sent - waiting


class Recorder(bytearray):
    """A socket that records what is sent."""

    sendall = bytearray.extend


class ChunkScanner:
    """Find the end of a chunked body without decoding it. gunicorn's reader decodes it once it is complete."""

    def __init__(self) -> None:
        self.size = 0  # sum of the announced chunk sizes
        self.chunks = 0
        self._position = 0
        self._trailer: int | None = None

    def find_end(self, body: bytearray) -> int | None:
        """Return the length of the complete body, or of a malformed one, which stays malformed; None if it is incomplete."""
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
    """A request and its response. ``length`` is that of the body, None for a chunked one."""

    request: Any
    response: Any
    environ: dict[str, Any]
    writer: ResponseWriter
    source: list[bytes]  # what gunicorn's reader of chunked bodies reads
    length: int | None
    is_prediction: bool
    scanner: ChunkScanner = field(default_factory=ChunkScanner)
    body: bytes = b""
    slot: Slot | None = None
    lane: Lane | None = None
    iterable: Any = None
    iterator: Iterator[bytes] | None = None
    context: Context = field(default_factory=Context)  # a response that paused may continue in another thread
    delivered: int = 0


class Connection:
    """A client's connection. Only the loop accesses it, except for the exchange while that runs in a lane."""

    def __init__(self, sock: socket.socket, client: Any, server: Any) -> None:
        self.sock, self.client, self.server = sock, client, server
        self.state = State.RECEIVING
        self.buffer = bytearray()  # received bytes that are not yet processed
        self.scanned = 0  # leading bytes of the buffer in which no head ends
        self.discard = 0  # bytes of a rejected body that are still to come
        self.exchange: Exchange | None = None
        self.timer: Timer | None = None
        self.events = 0
        self.is_half_closed = False  # the client sends nothing more


class Lane:
    """A fixed number of threads with a bounded queue. Only the loop calls it."""

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
        """Run in a thread what would delay the loop."""
        self._pool.submit(work, *args)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class EventLoopWorker(Worker):
    """The worker that the module describes. Methods named ``_run...`` run in a lane's thread, all others in the loop."""

    _middleware: RequestMiddleware
    _settings: Settings
    _selector: selectors.BaseSelector

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._connections: set[Connection] = set()
        self._timers: dict[Timer, dict[Connection, float]] = {
            timer: {} for timer in Timer
        }  # connections and when they expire, the earliest first
        self._queued: deque[Connection] = deque()
        self._finished: deque[tuple[Connection, Outcome]] = deque()
        self._receive_buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._is_accepting = False
        self._accept_after = 0.0
        self._buffered = 0  # received bytes of requests that do not run yet
        self._unsent = 0  # bytes of responses that wait for clients
        self._next_tick = 0.0
        self._templates: dict[Any, bytes] = {}
        self._template_problem: Problem | None = None

    # Life cycle

    def run(self) -> None:
        """Serve until the worker has to stop, then finish what was accepted. gunicorn calls this."""
        self._configure()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.PIPE[0], READ, self._drain_pipe)
        for listener in self.sockets:
            listener.setblocking(False)
        while self.alive:
            self._turn()
            if self.ppid != os.getppid():
                self.log.info("Parent changed, shutting down: %s", self)
                break
        self._stop()
        for lane in (self._predictions, self._pages, self._images, self._probes):
            lane.close()
        self._selector.close()

    def _configure(self) -> None:
        services = services_of(self.wsgi)
        self._settings = settings = services.settings
        assert services.middleware
        self._middleware = services.middleware
        self._timeouts_s = {
            Timer.FIRST_BYTE: settings.first_byte_timeout_s,
            Timer.HEAD: settings.head_timeout_s,
            Timer.BODY: settings.body_timeout_s,
            Timer.KEEPALIVE: settings.keepalive_s,
            Timer.SEND: settings.send_timeout_s,
            Timer.LINGER: LINGER_S,
            Timer.STOP: STOP_S,
        }
        self._max_buffered = int(settings.max_buffered_mb * (1 << 20))
        page_threads = settings.page_threads or max(1, self.cfg.threads // 4)
        max_waiting = settings.page_queue
        self._predictions = Lane("predict", min(self.cfg.threads, settings.max_in_flight), settings.max_in_flight)
        self._pages = Lane("page", page_threads, max_waiting)
        self._images = Lane("image", max(1, page_threads // 2), max_waiting)
        self._probes = Lane("probe", PROBE_THREADS, max_waiting)

    def _stop(self) -> None:
        """Accept the connections in the backlog, stop listening, and finish what began, within SHUTDOWN_TIMEOUT_S."""
        until = time.monotonic() + self.cfg.graceful_timeout
        self.alive = False
        for listener in self.sockets:
            while self._accept_one(listener):
                pass
        self._set_accepting(False)
        for listener in self.sockets:
            listener.close()
        for timer in (Timer.FIRST_BYTE, Timer.KEEPALIVE):
            for connection in list(self._timers[timer]):
                self._set_timer(connection, Timer.STOP)
        while self._connections and time.monotonic() < until:
            self._turn()
        for connection in list(self._connections):
            self._close(connection)

    def _turn(self) -> None:
        """Wait for events and process them."""
        now = time.monotonic()
        if now >= self._next_tick:
            self.notify()  # gunicorn's heartbeat
            self._middleware.metrics.connections.set(len(self._connections))
            self._next_tick = now + TICK_S
        if self.alive:
            has_room = len(self._connections) < self.cfg.worker_connections or self._can_evict()
            self._set_accepting(has_room and now >= self._accept_after)
            if pause_s := self._middleware.admission.accept_pause_s:
                # At capacity, waking for each request costs more than rejecting it, so let several arrive.
                time.sleep(pause_s)
        ready = self._selector.select(self._select_timeout(now))
        self._collect_finished()  # first, as a connection whose response is complete may have its next request
        for key, events in ready:
            key.data(events)
        for _ in range(len(self._queued)):
            self._guard(self._queued.popleft(), self._process_buffer)
        self._expire(time.monotonic())

    def _select_timeout(self, now: float) -> float:
        if self._queued or self._finished:
            return 0.0
        ends = [next(iter(waiting.values())) for waiting in self._timers.values() if waiting]
        ends += [self._next_tick, *([self._accept_after] if self._accept_after > now else [])]
        return max(0.0, min(ends) - now)

    def _drain_pipe(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.PIPE[0], 4096)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups
            os.write(self.PIPE[1], b"\0")

    def _guard(self, connection: Connection, step: Any) -> None:
        """Run one step for a connection. An error in it closes only that connection."""
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
        if accepting == self._is_accepting:
            return
        for listener in self.sockets:
            if accepting:
                self._selector.register(listener, READ, partial(self._accept, listener))
            else:
                self._selector.unregister(listener)
        self._is_accepting = accepting

    def _accept(self, listener: Any, _events: int) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            if not self._accept_one(listener):
                return

    def _accept_one(self, listener: Any) -> bool:
        """Accept a connection, and return whether there may be another."""
        is_at_capacity = len(self._connections) >= self.cfg.worker_connections
        if is_at_capacity and not self._can_evict():
            return False
        try:
            sock, client = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._middleware.metrics.connections_cut.labels("file_limit").inc()
                self._evict()
                self._set_accepting(False)
                self._accept_after = time.monotonic() + ACCEPT_PAUSE_S
            return error.errno == errno.ECONNABORTED  # that client has gone already
        if is_at_capacity:
            self._evict()
        sock.setblocking(False)
        connection = Connection(sock, client, listener.getsockname())
        self._connections.add(connection)
        self._set_timer(connection, Timer.FIRST_BYTE if self.alive else Timer.STOP)
        self._listen(connection, READ)
        self._guard(connection, self._receive)  # most have sent a request by now
        return True

    def _can_evict(self) -> bool:
        return any(self._timers[timer] for timer in EVICTION_ORDER)

    def _evict(self) -> None:
        """Close the longest waiting connection of the least important group that has one."""
        for timer in EVICTION_ORDER:
            if waiting := self._timers[timer]:
                self._cut(next(iter(waiting)), "connection_limit")
                return

    def _listen(self, connection: Connection, events: int) -> None:
        """Wait for ``events`` of the connection. 0 unregisters it, as a selector has no entries without events."""
        if events == connection.events:
            return
        if not events:
            self._selector.unregister(connection.sock)
        elif connection.events:
            self._selector.modify(connection.sock, events, partial(self._on_event, connection))
        else:
            self._selector.register(connection.sock, events, partial(self._on_event, connection))
        connection.events = events

    def _on_event(self, connection: Connection, _events: int) -> None:
        if connection.state in (State.RECEIVING, State.LINGERING):
            self._guard(connection, self._receive)
        elif connection.state is State.SENDING:
            self._guard(connection, self._send)
        else:  # the client has sent another request, or has gone
            self._listen(connection, 0)

    def _set_timer(self, connection: Connection, timer: Timer | None) -> None:
        if connection.timer:
            del self._timers[connection.timer][connection]
        connection.timer = timer
        if timer:
            self._timers[timer][connection] = time.monotonic() + self._timeouts_s[timer]

    def _expire(self, now: float) -> None:
        for timer, waiting in self._timers.items():
            while waiting:
                connection, end = next(iter(waiting.items()))
                if end > now:
                    break
                if timer is Timer.SEND and self._is_reading(connection):
                    self._set_timer(connection, Timer.SEND)
                elif timer is Timer.BODY and connection.exchange:
                    self._middleware.metrics.connections_cut.labels("body_timeout").inc()
                    self._set_timer(connection, None)
                    self._guard(connection, self._reject_late_body)
                elif timer in (Timer.KEEPALIVE, Timer.LINGER, Timer.STOP):
                    self._close(connection)
                else:
                    self._cut(connection, f"{timer.name.lower()}_timeout")

    def _is_reading(self, connection: Connection) -> bool:
        """Return whether the client acknowledged enough of its response since the timer was set."""
        exchange = connection.exchange
        assert exchange
        before, exchange.delivered = exchange.delivered, exchange.writer.delivered()
        return exchange.delivered - before >= MIN_SENT_BYTES

    def _cut(self, connection: Connection, reason: str) -> None:
        """Close a connection because of its client or a limit, and drop what is unsent."""
        self._middleware.metrics.connections_cut.labels(reason).inc()
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
                if exchange.iterator and hasattr(exchange.iterable, "close"):
                    self._pages.clean_up(exchange.context.run, exchange.iterable.close)
            if exchange.slot:
                exchange.slot.release()
        connection.state = State.CLOSED
        self._connections.discard(connection)
        connection.sock.close()

    def _linger(self, connection: Connection) -> None:
        """Close the sending half, and read until the client closes: a reset could overtake the response."""
        connection.exchange = None
        self._drop_buffer(connection)
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:  # the client is gone
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
        try:
            size = connection.sock.recv_into(self._receive_buffer)
        except BlockingIOError:
            return
        except OSError as error:
            raise DisconnectedError from error
        if size == 0:
            self._end_of_input(connection)
        elif connection.state is not State.LINGERING:
            if connection.timer in (Timer.FIRST_BYTE, Timer.KEEPALIVE, Timer.STOP):
                self._set_timer(connection, None)
            connection.buffer += self._receive_buffer[:size]
            self._buffered += size
            self._process_buffer(connection)
            if self._buffered > self._max_buffered:
                self._free_buffers()

    def _end_of_input(self, connection: Connection) -> None:
        """The client has closed its connection, or at least its sending half."""
        connection.is_half_closed = True
        exchange = connection.exchange
        if connection.state is State.RECEIVING and exchange:
            received = len(connection.buffer)
            is_chunked = exchange.length is None
            problem = body_malformed() if is_chunked else body_incomplete(received, exchange.length or 0)
            self._reject(connection, problem, close=True)
        else:
            self._close(connection)

    def _process_buffer(self, connection: Connection) -> None:
        """Process at most one request of the received bytes, so that pipelined requests do not delay other clients."""
        connection.state = State.RECEIVING
        if connection.discard:
            size = min(connection.discard, len(connection.buffer))
            connection.discard -= size
            del connection.buffer[:size]
            self._buffered -= size
            if connection.discard:
                self._listen(connection, READ)
                return
            self._set_timer(connection, None)
        if connection.exchange:
            self._receive_body(connection)
        elif not (connection.buffer and self._read_head(connection)):
            if connection.timer is None:
                self._set_timer(connection, Timer.HEAD if connection.buffer else self._idle_timer)
            self._listen(connection, READ)

    @property
    def _idle_timer(self) -> Timer:
        return Timer.KEEPALIVE if self.alive else Timer.STOP

    def _read_head(self, connection: Connection) -> bool:
        """Start the request whose head is complete, and return whether there was one. gunicorn's parser validates it."""
        buffer, scanned = connection.buffer, connection.scanned
        end = buffer.find(b"\r\n\r\n", max(0, scanned - 3))
        if end < 0 and len(buffer) <= MAX_HEAD_BYTES and not BARE_LF.search(buffer, scanned):
            connection.scanned = len(buffer)
            return False
        source = [bytes(buffer[: end + 4] if end >= 0 else buffer)]
        writer = ResponseWriter(connection.sock)
        request = None
        try:
            if len(source[0]) > MAX_HEAD_BYTES:
                raise LimitRequestHeaders("max buffer headers")
            request = next(get_parser(self.cfg, growing_iterator(source), connection.client))
            _check_connection_headers(request)
            if self._middleware.admission.is_at_capacity and self._reject_from_template(connection, request, end + 4):
                return True
            expects_continue, request._expected_100_continue = request._expected_100_continue, False
            response, environ = wsgi.create(request, writer, connection.client, connection.server, self.cfg)
        except (NoMoreData, StopIteration):
            connection.scanned = len(buffer)
            return False
        except Exception as error:
            self._middleware.metrics.requests_rejected.labels("invalid_head").inc()
            self.handle_error(request, writer, connection.client, error)
            writer.flush()
            self._set_timer(connection, None)
            self._linger(connection)
            return True
        connection.scanned = 0
        self._consume(connection, end + 4)
        environ["wsgi.multithread"] = True
        self._middleware.begin(environ)
        length = None if "HTTP_TRANSFER_ENCODING" in environ else int(environ.get("CONTENT_LENGTH", 0))
        is_prediction = self._middleware.is_prediction(environ)
        connection.exchange = Exchange(request, response, environ, writer, source, length, is_prediction)
        self._admit(connection, connection.exchange, expects_continue=expects_continue)
        return True

    def _admit(self, connection: Connection, exchange: Exchange, *, expects_continue: bool) -> None:
        """Reject the request before its body, or receive the body."""
        self._set_timer(connection, None)
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("Autorestarting worker after current request.")
            self.alive = False
        if not self.alive:
            exchange.response.force_close()
        if exchange.is_prediction and self._middleware.admission.is_at_capacity:
            self._reject_overloaded(connection, close=expects_continue)
        elif exchange.length is not None and exchange.length > self._settings.max_body_bytes:
            exchange.response.force_close()  # the application writes the error response
            self._dispatch(connection)
        else:
            if expects_continue and not connection.buffer:
                with contextlib.suppress(OSError):  # the next read notices that the client is gone
                    connection.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._receive_body(connection)

    def _receive_body(self, connection: Connection) -> None:
        exchange = connection.exchange
        assert exchange
        if (size := exchange.length) is None:
            scanner, limit = exchange.scanner, self._settings.max_body_bytes
            size = scanner.find_end(connection.buffer)
            # The second bound is on what surrounds the data: tiny chunks and long extensions.
            is_padded = scanner.chunks > MAX_CHUNKS or len(connection.buffer) > 2 * limit + MAX_HEAD_BYTES
            if scanner.size > limit or is_padded:
                self._reject(connection, body_too_large(limit), close=True)
                return
        if size is None or size > len(connection.buffer):
            if connection.timer is None:
                self._set_timer(connection, Timer.BODY)
            self._listen(connection, READ)
            return
        self._set_timer(connection, None)
        exchange.body = self._consume(connection, size)
        self._dispatch(connection)

    def _dispatch(self, connection: Connection) -> None:
        """Run the request in a thread, now or when one is free."""
        exchange = connection.exchange
        assert exchange
        environ = exchange.environ
        if exchange.is_prediction and REJECTION not in environ:
            exchange.slot = environ[SLOT] = self._middleware.admission.try_acquire_slot()
            if not exchange.slot:
                self._reject_overloaded(connection)
                return
            lane = self._predictions
        elif PROBE_PATHS.fullmatch(environ["PATH_INFO"]):
            lane = self._probes
        else:
            lane = self._images if IMAGE_PATHS.fullmatch(environ["PATH_INFO"]) else self._pages
        if lane.is_at_capacity or (not lane.free and self._buffered + len(exchange.body) > self._max_buffered):
            self._middleware.metrics.requests_rejected.labels(f"{lane.name}_queue_full").inc()
            self._reject(connection, Problem("overloaded", LANE_FULL, headers={"Retry-After": "1"}), in_loop=True)
            return
        connection.state, exchange.lane = State.RUNNING, lane
        if lane.free:
            lane.run(self._run, connection)
        else:
            self._buffered += len(exchange.body)
            lane.waiting.append(connection)

    # Rejections

    def _reject_overloaded(self, connection: Connection, *, close: bool = False) -> None:
        self._middleware.metrics.requests_rejected.labels("at_capacity").inc()
        self._reject(connection, self._middleware.overloaded(), close=close)

    def _reject_late_body(self, connection: Connection) -> None:
        self._reject(connection, body_timeout(self._settings.body_timeout_s), close=True)

    def _reject(self, connection: Connection, problem: Problem, *, close: bool = False, in_loop: bool = False) -> None:
        """Respond with ``problem``.

        Args:
            connection: Its exchange is the rejected request.
            problem: What the response says.
            close: Close the connection afterwards. Otherwise the rest of a short body is discarded as it arrives, and only a
                longer one closes the connection.
            in_loop: Respond without a thread, even if the application has its own form for rejections of this path.
        """
        exchange = connection.exchange
        assert exchange
        self._set_timer(connection, None)
        if exchange.slot:
            exchange.slot.release()
            exchange.slot = exchange.environ[SLOT] = None
        missing = 0 if exchange.body else exchange.length
        if close or missing is None or missing >= MAX_DISCARDED_BYTES:
            exchange.response.force_close()
        else:
            connection.discard = missing
        exchange.environ[REJECTION] = problem
        if not in_loop and self._middleware.has_own_rejections(exchange.environ):
            self._dispatch(connection)
            return
        exchange.environ["wsgi.input"] = BytesIO()
        connection.state = State.RUNNING
        for chunk in self._middleware.respond(exchange.environ, exchange.response.start_response):
            exchange.response.write(chunk)
        exchange.response.close()
        exchange.writer.flush()
        self._continue(connection, Outcome.COMPLETE)

    def _reject_from_template(self, connection: Connection, request: Any, head_bytes: int) -> bool:
        """Send a plain POST /predict the bytes that ``_reject`` would send, for half of the work.

        A flood consists of such requests. At ten times the capacity, 5 to 27% more predictions are served with this than
        without it.
        """
        headers = dict(request.headers)
        is_plain = request.method == "POST" and request.path == "/predict" and NOT_PLAIN.isdisjoint(headers)
        if not is_plain or not self.alive:
            return False
        length = int(headers.get("CONTENT-LENGTH", 0))
        if length >= MAX_DISCARDED_BYTES:
            request.force_close()
        response = self._template(request).replace(TEMPLATE_ID.encode(), uuid.uuid4().hex.encode())
        self._middleware.count_overloaded()
        self._set_timer(connection, None)
        connection.scanned = 0
        self._consume(connection, head_bytes)
        try:
            sent = connection.sock.send(response)
        except OSError as error:  # also if the kernel has no room: the client does not read its responses
            raise DisconnectedError from error
        if sent < len(response):
            raise DisconnectedError
        if request.should_close():
            self._linger(connection)
        else:
            connection.discard = length
            self._await_request(connection)
        return True

    def _template(self, request: Any) -> bytes:
        """Return the rejection of a plain request, with TEMPLATE_ID for its ID. It is rendered once for each problem."""
        problem, key = self._middleware.overloaded(), (request.version, request.should_close())
        if problem is not self._template_problem:
            self._template_problem, self._templates = problem, {}
        if key not in self._templates:
            recorder = Recorder()
            response, environ = wsgi.create(request, recorder, ("", 0), ("", 0), self.cfg)
            environ |= {"HTTP_X_REQUEST_ID": TEMPLATE_ID, REJECTION: problem}
            self._middleware.begin(environ)
            for chunk in self._middleware.respond(environ, response.start_response, counts=False):
                response.write(chunk)
            response.close()
            self._templates[key] = bytes(recorder)
        return self._templates[key]

    # Limit the total size of received requests that are not running yet

    def _consume(self, connection: Connection, size: int) -> bytes:
        buffer = connection.buffer
        with memoryview(buffer) as view:
            consumed = bytes(view[:size])
        del buffer[:size]
        self._buffered -= size
        return consumed

    def _drop_buffer(self, connection: Connection) -> None:
        self._buffered -= len(connection.buffer)
        connection.buffer.clear()

    def _free_buffers(self) -> None:
        """Cut the requests that have been arriving for longest until the rest fits."""
        for timer in (Timer.BODY, Timer.HEAD):
            while self._buffered > self._max_buffered and self._timers[timer]:
                self._cut(next(iter(self._timers[timer])), "buffer_limit")

    # Responses

    def _run(self, connection: Connection) -> None:
        """Run the application for a request, or continue its response."""
        exchange = connection.exchange
        assert exchange
        outcome = Outcome.FAILED
        try:
            outcome = exchange.context.run(self._run_application, connection.client, exchange)
        except BaseException:
            self.log.exception("Error handling request")
        self._finished.append((connection, outcome))
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
            if response.headers_sent:  # only closing the connection shows that the response is incomplete
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
                # Free the body now: the loop may collect the exchange later.
                exchange.environ.pop("wsgi.input", None)
                exchange.source.clear()
        return outcome

    def _run_request(self, exchange: Exchange) -> Iterable[bytes]:
        environ, application = exchange.environ, self.wsgi
        if exchange.length is None and REJECTION not in environ:
            exchange.source.append(exchange.body)
            try:
                exchange.body = exchange.request.body.read()
            except Exception:  # gunicorn raises various types on malformed chunks
                exchange.response.force_close()
                environ[REJECTION] = body_malformed()
                if not self._middleware.has_own_rejections(environ):
                    application = self._middleware.respond
        environ["wsgi.input"] = BytesIO(exchange.body)
        exchange.body = b""
        result: Iterable[bytes] = application(environ, exchange.response.start_response)
        return result

    def _collect_finished(self) -> None:
        """Take back the connections of finished threads, and start the waiting ones."""
        while self._finished:
            connection, outcome = self._finished.popleft()
            exchange = connection.exchange
            assert exchange
            assert exchange.lane
            lane = exchange.lane
            lane.free += 1
            self._guard(connection, partial(self._continue, outcome=outcome))
            while lane.free and lane.waiting:
                waiting = lane.waiting.popleft()
                assert waiting.exchange
                if not waiting.exchange.iterator:
                    self._buffered -= len(waiting.exchange.body)
                lane.run(self._run, waiting)

    def _continue(self, connection: Connection, outcome: Outcome) -> None:
        """Send the rest of a response, or wait for the next request, or close the connection."""
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
            self._linger(connection)
        else:
            self._await_request(connection)

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
            self._continue(connection, Outcome.COMPLETE)
            return
        assert exchange.lane
        connection.state = State.RUNNING
        if exchange.lane.free:
            exchange.lane.run(self._run, connection)
        else:
            exchange.lane.waiting.append(connection)

    def _await_request(self, connection: Connection) -> None:
        """Wait for the connection's next request."""
        connection.exchange = None
        if connection.discard:
            self._set_timer(connection, Timer.BODY)
        if connection.buffer:
            connection.state = State.QUEUED
            self._queued.append(connection)
            return
        connection.state = State.RECEIVING
        if not connection.discard:
            self._set_timer(connection, self._idle_timer)
        self._listen(connection, READ)


def _check_connection_headers(request: Any) -> None:
    """Apply what RFC 9112 requires and gunicorn's parser does not: a Host in HTTP/1.1, and ``close`` among other options."""
    names = {name for name, _ in request.headers}
    if request.version >= (1, 1) and "HOST" not in names:
        raise InvalidHeader("HOST")
    options = ",".join(value for name, value in request.headers if name == "CONNECTION")
    if "close" in [option.strip().lower() for option in options.split(",")]:
        request.force_close()


def growing_iterator(source: list[bytes]) -> Iterator[bytes]:
    """Iterate over a list that may grow. gunicorn takes an iterable in place of a socket."""
    position = 0
    while True:
        if position < len(source):
            yield source[position]
            position += 1
        else:
            yield b""

"""A gunicorn worker in which no thread waits for a client.

One asyncio loop in the worker's main thread does all waiting: it accepts connections, receives heads and bodies, sends what
did not fit into the kernel's send buffer, and closes connections. Each connection is a coroutine (``_serve``). A request
occupies a thread from when its body is complete until its response is complete, or until the client reads more slowly than
the application writes. Slow, silent and unread clients therefore cost one connection each, and connections are bounded:
``Timer`` lists how long each may take for what, and ``EventLoopWorker._evict`` closes one when there are too many.

Requests run in lanes (``Lane``) with threads of their own, so that pages cannot starve predictions, nor either of them
probes. The loop rejects a prediction above the server's capacity after its head and before its body. A response that sends
events (``EVENT_STREAM``) takes a thread for each of its chunks and pauses in the loop in between.

Plain HTTP/1.1 only: a proxy terminates TLS and HTTP/2. ``GUNICORN_WORKER=stock`` runs gunicorn's threaded worker instead.

Internals of gunicorn that are used beyond its documented worker class, each with a contract test
(tests/service/http/test_gunicorn_contract.py):

- ``http.get_parser(cfg, iterable, address)`` parses a head and raises ``http.errors.NoMoreData`` if it is incomplete.
- A request has ``method``, ``path``, ``version``, ``headers``, ``force_close()``, ``should_close()`` and
  ``_expected_100_continue``.
- ``http.wsgi.create`` makes the environment and a response that writes to the given socket only by ``sendall``.
- A response has ``write``, ``close``, ``should_close``, ``force_close``, ``headers_sent``, ``sent`` and ``response_length``.
- ``http.errors.InvalidHeader`` and ``LimitRequestHeaders`` become 400 and 431 in ``Worker.handle_error``, which writes to the
  given socket.
- ``Worker.PIPE`` wakes the loop, also on signals.
"""

from __future__ import annotations

import asyncio
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from enum import Enum, auto
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar

from gunicorn.http import get_parser, wsgi
from gunicorn.http.errors import InvalidHeader, LimitRequestHeaders, NoMoreData
from gunicorn.workers.base import Worker

from service.context import services_of
from service.http import CAN_STREAM, EVENT_STREAM, IMAGE_PATHS, PROBE_PATHS, REJECTION, SLOT
from service.http.errors import PROBLEM_MEDIA_TYPE, Problem
from service.http.request_body import body_incomplete, body_malformed, body_timeout, body_too_large

if TYPE_CHECKING:  # imported before the fork, when prometheus_client must not be loaded yet
    from service.http.admission import AdmissionController, Slot
    from service.http.middleware import RequestMiddleware
    from service.settings import Settings

RECEIVE_BYTES = 1 << 18
MAX_HEAD_BYTES = 1 << 16
MAX_DISCARDED_BYTES = 1 << 16  # a rejected body up to this size is read, so that the connection can be kept
CONGESTED_BYTES = 1 << 18  # unsent bytes at which a response pauses
MIN_SENT_BYTES = 1 << 14  # what a client has to read within SEND_TIMEOUT_S
MAX_CHUNKS = 100_000
MAX_CHUNK_LINE = 8190
ACCEPTED_AT_ONCE = 32
ACCEPT_PAUSE_S = 0.2  # pause in accepting after the process ran out of files
LINGER_S = 2.0
STOP_S = 2.0
HEAD_CODES = {400: "bad_request", 414: "uri_too_long", 431: "headers_too_large"}
EVENT_PAUSE_S = 1.0  # pause between two chunks of a response that sends events
TICK_S = 1.0
RESERVED_FILES = 128  # file descriptors for the model, databases, photos and logs
PROBE_THREADS = 2
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: drop unsent bytes and reset the connection
LANE_FULL = "Too many requests are waiting. Retry in a moment."
BARE_LF = re.compile(rb"(?<!\r)\n")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\r\n]*)?\r\n")
TRAILER_LINE = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*)?\r\n")
T = TypeVar("T")


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit, and return the number of connections that leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems reject an unlimited one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else max(16, soft - RESERVED_FILES)


class Timer(Enum):
    """What the loop waits for a client to do. ``EventLoopWorker._configure`` sets the time for each.

    If there are too many connections, they are closed in this order, and the longest waiting one of a group first.
    """

    FIRST_BYTE = auto()
    KEEPALIVE = auto()
    STOP = auto()  # a request that may be on its way when the worker stops
    LINGER = auto()
    HEAD = auto()
    SEND = auto()
    BODY = auto()


class DisconnectedError(Exception):
    """The client closed the connection, or the worker did."""


class ResponseBuffer(bytearray):
    """The socket that gunicorn's response writes to: it collects what the loop then sends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    sendall = bytearray.extend

    def recv(self, size: int, flags: int) -> bytes:
        """Check whether the client is connected (``service.http.request_images.is_client_connected``)."""
        raise ConnectionResetError if self._connection.is_closed else BlockingIOError

    def gettimeout(self) -> float:
        return 0.0


@dataclass(eq=False)
class Exchange:
    """A request and its response. ``length`` is that of the body, None for a chunked one."""

    request: Any
    response: Any
    environ: dict[str, Any]
    output: ResponseBuffer
    length: int | None
    is_prediction: bool
    expects_continue: bool
    body: bytes | None = None  # None until it is complete
    slot: Slot | None = None
    iterable: Any = None
    iterator: Iterator[bytes] | None = None
    context: Context = field(default_factory=Context)  # a response that paused may continue in another thread

    def release_slot(self) -> None:
        if self.slot:
            self.slot.release()
            self.slot = self.environ[SLOT] = None


class Connection(asyncio.BufferedProtocol):
    """A client's connection. Only the loop accesses it."""

    transport: asyncio.Transport | None = None

    def __init__(self, worker: EventLoopWorker, client: Any, server: Any) -> None:
        self.client, self.server = client, server
        self.buffer = bytearray()  # received bytes that are not yet processed
        self.held = 0  # received bytes, including those of a request that does not run yet
        self.idle_timer = Timer.FIRST_BYTE
        self.timer: Timer | None = None
        self.is_late = False  # the timer of a body has ended
        self.is_half_closed = False  # the client sends nothing more
        self.is_closed = False
        self._worker = worker
        self._written = self._delivered = 0
        self._is_receiving = False
        self._waiter: asyncio.Future[None] | None = None

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(0)
        if self.is_closed:
            transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._worker.receive_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.buffer += self._worker.receive_buffer[:nbytes]
        self.held += nbytes
        self._worker.count_held(nbytes)
        if not self._is_receiving and self.transport:
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self.is_half_closed = True
        self._wake()
        return True

    def resume_writing(self) -> None:
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        self._wake()

    # What the connection's coroutine calls

    async def receive(self, timer: Timer) -> None:
        """Wait for more bytes.

        Raises:
            DisconnectedError: There will be none.
            TimeoutError: The body is late.
        """
        assert self.transport
        size = len(self.buffer)
        self._is_receiving = True
        self.transport.resume_reading()
        try:
            while len(self.buffer) == size:
                if self.is_closed or self.is_half_closed:
                    raise DisconnectedError
                if self.is_late:
                    raise TimeoutError
                await self._wait(timer)
        finally:
            self._is_receiving = False

    def take(self, size: int) -> bytes:
        """Remove the first ``size`` bytes of the buffer."""
        with memoryview(self.buffer) as view:
            taken = bytes(view[:size])
        del self.buffer[:size]
        return taken

    async def take_line(self, max_bytes: int, timer: Timer) -> bytes:
        """Receive a line. It ends without a line feed if it is longer than ``max_bytes``."""
        while (end := self.buffer.find(b"\n")) < 0 and len(self.buffer) <= max_bytes:
            await self.receive(timer)
        return self.take(end + 1 if end >= 0 else max_bytes)

    def forget_processed(self) -> None:
        """Count only the buffer as held."""
        self._worker.count_held(len(self.buffer) - self.held)
        self.held = len(self.buffer)

    def send(self, data: bytes | bytearray) -> None:
        if self.is_closed or not self.transport:
            raise DisconnectedError
        self._written += len(data)
        self.transport.write(bytes(data))

    @property
    def unsent(self) -> int:
        return self.transport.get_write_buffer_size() if self.transport else 0

    async def sent(self) -> None:
        """Wait until the kernel has taken everything. Raises DisconnectedError."""
        while self.unsent:
            if self.timer is not Timer.SEND:
                self.made_progress()
                self._worker.set_timer(self, Timer.SEND)
                self._worker.limit_unsent()
            await self._wait(Timer.SEND)
        if self.is_closed:
            raise DisconnectedError
        self._worker.set_timer(self, None)

    async def pause(self, seconds: float) -> None:
        """Wait while the client stays connected. Raises DisconnectedError."""
        assert self.transport
        if not self.buffer:
            self.transport.resume_reading()  # notices that the client disconnects
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        handle = loop.call_later(seconds, self._wake)
        try:
            await self._waiter
        finally:
            handle.cancel()
        if self.is_closed or self.is_half_closed:
            raise DisconnectedError

    def made_progress(self) -> bool:
        """Return whether the client has acknowledged enough of its response since the last call."""
        assert self.transport
        try:
            waiting = fcntl.ioctl(self.transport.get_extra_info("socket"), termios.TIOCOUTQ, b"\0" * 4)
        except OSError:  # not a TCP socket
            waiting = b"\0" * 4
        before, self._delivered = self._delivered, self._written - self.unsent - struct.unpack("i", waiting)[0]
        return self._delivered - before >= MIN_SENT_BYTES

    # What the worker calls

    def time_out(self) -> None:
        """Have ``receive`` raise TimeoutError."""
        self.is_late = True
        self._wake()

    def abort(self, *, reset: bool = False) -> None:
        """Close the connection and drop what is unsent."""
        self.is_closed = True
        if self.transport:
            if reset and self.unsent:
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.transport.abort()

    async def _wait(self, timer: Timer) -> None:
        self._worker.set_timer(self, timer)
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


async def receive_chunks(connection: Connection, limit: int) -> bytes:
    """Receive a chunked body. Trailers are dropped.

    Raises:
        Problem: The body is malformed, or larger than ``limit`` bytes.
        DisconnectedError: The body is incomplete.
        TimeoutError: The body is late.
    """
    body = bytearray()
    for _ in range(MAX_CHUNKS):
        line = CHUNK_LINE.fullmatch(await connection.take_line(MAX_CHUNK_LINE, Timer.BODY))
        if not line:
            raise body_malformed()
        size = int(line[1], 16)
        # The second bound is on what surrounds the data: long extensions of tiny chunks.
        if len(body) + size > limit or connection.held > 2 * limit + MAX_HEAD_BYTES:
            raise body_too_large(limit)
        if not size:
            trailers = 0
            while (trailer := await connection.take_line(MAX_CHUNK_LINE, Timer.BODY)) != b"\r\n":
                trailers += len(trailer)
                if not TRAILER_LINE.fullmatch(trailer) or trailers > MAX_HEAD_BYTES:
                    raise body_malformed()
            return bytes(body)
        while len(connection.buffer) < size + 2:
            await connection.receive(Timer.BODY)
        body += connection.take(size)
        if connection.take(2) != b"\r\n":
            raise body_malformed()
    raise body_too_large(limit)


class PausingSelector(selectors.DefaultSelector):
    """At capacity, let several requests arrive before the loop wakes: waking for each costs more than rejecting it."""

    def __init__(self, admission: AdmissionController) -> None:
        super().__init__()
        self._admission = admission

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout != 0 and (pause_s := self._admission.accept_pause_s):
            time.sleep(pause_s)
        return super().select(timeout)


class Lane:
    """A fixed number of threads with a bounded queue. Only the loop calls it."""

    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        self.name = name
        self._max_waiting = max_waiting
        self._waiting = 0
        self._free = asyncio.Semaphore(threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    @property
    def is_busy(self) -> bool:
        return self._free.locked()

    @property
    def is_at_capacity(self) -> bool:
        return self.is_busy and self._waiting >= self._max_waiting

    async def run(self, connection: Connection, work: Callable[[], T]) -> T:
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            connection.forget_processed()
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._free.release()

    def clean_up(self, work: Any, *args: Any) -> None:
        """Run in a thread what would delay the loop."""
        self._pool.submit(work, *args)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class EventLoopWorker(Worker):
    """The worker that the module describes. Methods named ``_run...`` run in a lane's thread, all others in the loop."""

    alive: bool
    _loop: asyncio.AbstractEventLoop
    _middleware: RequestMiddleware
    _settings: Settings
    _stopping: asyncio.Event

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.receive_buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._connections: dict[Connection, asyncio.Task[None]] = {}
        self._waiting: dict[Timer, dict[Connection, asyncio.TimerHandle]] = {timer: {} for timer in Timer}
        self._held = 0  # received bytes of requests that do not run yet
        self._streaming: set[Connection] = set()  # connections that receive events

    # Life cycle

    def run(self) -> None:
        """Serve until the worker has to stop, then finish what was accepted. gunicorn calls this."""
        self._configure()
        self._loop = asyncio.SelectorEventLoop(PausingSelector(self._middleware.admission))
        self._loop.run_until_complete(self._serve_all())
        for lane in self._lanes:
            lane.close()
        self._loop.close()

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
        self._lanes = (self._predictions, self._pages, self._images, self._probes)

    async def _serve_all(self) -> None:
        self._stopping = asyncio.Event()
        self._loop.add_reader(self.PIPE[0], self._drain_pipe)
        for listener in self.sockets:
            listener.setblocking(False)
        self._accept_again()
        self._tick()
        await self._stopping.wait()
        await self._finish()

    def _tick(self) -> None:
        self.notify()  # gunicorn's heartbeat
        self._middleware.metrics.connections.set(len(self._connections))
        if self.alive and self.ppid != os.getppid():
            self.log.info("Parent changed, shutting down: %s", self)
            self.alive = False
            self._stopping.set()
        self._loop.call_later(TICK_S, self._tick)

    def _drain_pipe(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.PIPE[0], 4096)
        if not self.alive:
            self._stopping.set()

    async def _finish(self) -> None:
        """Accept the connections in the backlog, stop listening, and finish what began, within SHUTDOWN_TIMEOUT_S."""
        for listener in self.sockets:
            while self._accept_one(listener):
                pass
            self._loop.remove_reader(listener.fileno())
            listener.close()
        for connection in self._streaming:
            connection.abort()  # the client connects again, to another worker
        for timer in (Timer.FIRST_BYTE, Timer.KEEPALIVE):
            for connection in list(self._waiting[timer]):
                self.set_timer(connection, Timer.STOP)
        if self._connections:
            _, unfinished = await asyncio.wait(self._connections.values(), timeout=self.cfg.graceful_timeout)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    # Connections

    def _accept_again(self) -> None:
        if self.alive:
            for listener in self.sockets:
                self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _pause_accepting(self) -> None:
        for listener in self.sockets:
            self._loop.remove_reader(listener.fileno())
        self._loop.call_later(ACCEPT_PAUSE_S, self._accept_again)

    def _accept(self, listener: Any) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            if not self._accept_one(listener):
                return

    def _accept_one(self, listener: Any) -> bool:
        """Accept a connection, and return whether there may be another."""
        is_full = len(self._connections) >= self.cfg.worker_connections
        if is_full and not any(self._waiting.values()):
            self._pause_accepting()
            return False
        try:
            sock, client = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._middleware.metrics.connections_cut.labels("file_limit").inc()
                self._evict()
                self._pause_accepting()
            return error.errno == errno.ECONNABORTED  # that client has gone already
        if is_full:
            self._evict()
        sock.setblocking(False)
        connection = Connection(self, client, listener.getsockname())
        self.set_timer(connection, Timer.FIRST_BYTE if self.alive else Timer.STOP)
        self._connections[connection] = self._loop.create_task(self._serve(connection, sock))
        return True

    def _evict(self) -> None:
        """Close the longest waiting connection of the least important group that has one."""
        if longest := next((waiting for waiting in self._waiting.values() if waiting), None):
            self._cut(next(iter(longest)), "connection_limit")

    def _cut(self, connection: Connection, reason: str) -> None:
        """Close a connection because of its client or a limit."""
        self._middleware.metrics.connections_cut.labels(reason).inc()
        self.set_timer(connection, None)
        self._connections.pop(connection, None)
        connection.abort(reset=True)

    def set_timer(self, connection: Connection, timer: Timer | None) -> None:
        """Start a timer, unless it runs already, and end any other one."""
        if connection.timer is timer:
            return
        if connection.timer:
            self._waiting[connection.timer].pop(connection).cancel()
        connection.timer, connection.is_late = timer, False
        if timer:
            self._waiting[timer][connection] = self._loop.call_later(self._timeouts_s[timer], self._expire, connection, timer)

    def _expire(self, connection: Connection, timer: Timer) -> None:
        if timer is Timer.SEND and connection.made_progress():
            self.set_timer(connection, None)
            self.set_timer(connection, timer)
        elif timer is Timer.BODY:
            self._middleware.metrics.connections_cut.labels("body_timeout").inc()
            connection.time_out()
        elif timer in (Timer.KEEPALIVE, Timer.LINGER, Timer.STOP):
            connection.abort()
        else:
            self._cut(connection, f"{timer.name.lower()}_timeout")

    def count_held(self, size: int) -> None:
        """Count received bytes, and cut the requests that have been arriving for longest until the rest fits."""
        self._held += size
        for timer in (Timer.BODY, Timer.HEAD):
            while self._held > self._max_buffered and self._waiting[timer]:
                connection = next(iter(self._waiting[timer]))
                self._cut(connection, "buffer_limit")
                connection.buffer.clear()
                connection.forget_processed()

    def limit_unsent(self) -> None:
        """Cut the clients that have been reading for longest until the unsent bytes of the rest fit."""
        waiting = self._waiting[Timer.SEND]
        while waiting and sum(connection.unsent for connection in waiting) > self._max_buffered:
            self._cut(next(iter(waiting)), "buffer_limit")

    async def _serve(self, connection: Connection, sock: socket.socket) -> None:
        """Serve the requests of a connection one after the other. An error in one closes only its connection."""
        try:
            await self._loop.connect_accepted_socket(lambda: connection, sock)
            while await self._serve_request(connection):
                connection.idle_timer = Timer.KEEPALIVE
                if connection.buffer:
                    await asyncio.sleep(0)  # pipelined requests must not delay other clients
            await self._linger(connection)
        except (DisconnectedError, OSError):
            pass
        except Exception:
            self.log.exception("Error in a connection")
        finally:
            self.set_timer(connection, None)
            connection.abort()
            connection.buffer.clear()
            connection.forget_processed()
            self._connections.pop(connection, None)

    async def _linger(self, connection: Connection) -> None:
        """Close the sending half, and read until the client closes: a reset could overtake the response."""
        assert connection.transport
        connection.transport.write_eof()
        while True:
            connection.buffer.clear()
            connection.forget_processed()
            await connection.receive(Timer.LINGER)

    # Requests

    async def _serve_request(self, connection: Connection) -> bool:
        """Receive a request and send its response. Return whether the connection stays open."""
        exchange = await self._receive_head(connection)
        if exchange is None:
            return False
        lane = None
        try:
            exchange.body = await self._receive_body(connection, exchange)
            lane = self._choose_lane(exchange)
        except Problem as problem:
            self._reject(exchange, problem)
            if self._middleware.has_own_rejections(exchange.environ):
                try:
                    lane = self._choose_lane(exchange)
                except Problem as full:
                    self._reject(exchange, full)
        try:
            if lane:
                while not await lane.run(connection, lambda: exchange.context.run(self._run, connection.client, exchange)):
                    await self._send(connection, exchange)
                    if EVENT_STREAM in exchange.environ:
                        self._streaming.add(connection)
                        await connection.pause(EVENT_PAUSE_S)
            else:
                self._respond(exchange)
            await self._send(connection, exchange)
        finally:
            self._streaming.discard(connection)
            exchange.release_slot()
            if exchange.iterator and hasattr(exchange.iterable, "close"):
                self._pages.clean_up(exchange.context.run, exchange.iterable.close)
        if exchange.response.should_close():
            return False
        missing = 0 if exchange.body is not None else exchange.length or 0
        while missing > 0:
            missing -= len(connection.take(missing))
            if missing:
                await connection.receive(Timer.BODY)
        self.set_timer(connection, None)
        connection.forget_processed()
        return True

    async def _receive_head(self, connection: Connection) -> Exchange | None:
        """Receive a head, which gunicorn's parser validates. Return None if it was rejected."""
        buffer, scanned = connection.buffer, 0
        output = ResponseBuffer(connection)
        request = None
        try:
            while request is None:
                end = buffer.find(b"\r\n\r\n", max(0, scanned - 3))
                if len(buffer) > MAX_HEAD_BYTES and not 0 <= end <= MAX_HEAD_BYTES:
                    raise LimitRequestHeaders("max buffer headers")
                if end >= 0 or BARE_LF.search(buffer, scanned):
                    head = bytes(buffer[: end + 4] if end >= 0 else buffer)
                    with contextlib.suppress(NoMoreData, StopIteration):
                        request = next(get_parser(self.cfg, [head], connection.client))
                        break
                scanned = len(buffer)
                idle_timer = connection.idle_timer if self.alive else Timer.STOP
                await connection.receive(Timer.HEAD if buffer else idle_timer)
            _check_connection_headers(request)
            expects_continue, request._expected_100_continue = request._expected_100_continue, False
            response, environ = wsgi.create(request, output, connection.client, connection.server, self.cfg)
        except DisconnectedError:
            raise
        except Exception as error:
            self._middleware.metrics.requests_rejected.labels("invalid_head").inc()
            self.handle_error(request, output, connection.client, error)
            _replace_with_problem(output, error)
            connection.send(output)
            await connection.sent()
            return None
        self.set_timer(connection, None)
        connection.take(len(head))
        environ["wsgi.multithread"] = True
        environ[CAN_STREAM] = self.alive and len(self._streaming) < self._settings.studio_max_streams
        self._middleware.begin(environ)
        if not self.alive:
            response.force_close()
        length = None if "HTTP_TRANSFER_ENCODING" in environ else int(environ.get("CONTENT_LENGTH", 0))
        is_prediction = self._middleware.is_prediction(environ)
        return Exchange(request, response, environ, output, length, is_prediction, expects_continue)

    async def _receive_body(self, connection: Connection, exchange: Exchange) -> bytes:
        """Receive the body of a request, unless it is rejected before. Raises Problem and DisconnectedError."""
        limit, length = self._settings.max_body_bytes, exchange.length
        if length is not None and length > limit:
            exchange.response.force_close()
            if exchange.is_prediction:  # also at capacity, as a later attempt would fail too
                raise body_too_large(limit, length)
            return b""  # the application writes the error response
        if exchange.is_prediction and self._middleware.admission.is_at_capacity:
            if exchange.expects_continue:
                exchange.response.force_close()
            raise self._overloaded()
        if exchange.expects_continue and not connection.buffer:
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            if length is None:
                return await receive_chunks(connection, limit)
            while len(connection.buffer) < length:
                await connection.receive(Timer.BODY)
            return connection.take(length)
        except TimeoutError:
            problem = body_timeout(self._settings.body_timeout_s)
        except DisconnectedError:
            if connection.is_closed:
                raise
            problem = body_malformed() if length is None else body_incomplete(len(connection.buffer), length)
        except Problem as malformed:
            problem = malformed
        finally:
            self.set_timer(connection, None)
        exchange.response.force_close()
        raise problem

    def _choose_lane(self, exchange: Exchange) -> Lane:
        """Return the threads for a request whose body is complete. Raises Problem if too many are waiting."""
        environ = exchange.environ
        if exchange.is_prediction and REJECTION not in environ:
            exchange.slot = environ[SLOT] = self._middleware.admission.try_acquire_slot()
            if not exchange.slot:
                raise self._overloaded()
            lane = self._predictions
        elif PROBE_PATHS.fullmatch(environ["PATH_INFO"]):
            lane = self._probes
        else:
            lane = self._images if IMAGE_PATHS.fullmatch(environ["PATH_INFO"]) else self._pages
        if lane.is_at_capacity or (lane.is_busy and self._held > self._max_buffered):
            self._middleware.metrics.requests_rejected.labels(f"{lane.name}_queue_full").inc()
            raise Problem("overloaded", LANE_FULL, headers={"Retry-After": "1"})
        return lane

    def _overloaded(self) -> Problem:
        self._middleware.metrics.requests_rejected.labels("at_capacity").inc()
        return self._middleware.overloaded()

    def _reject(self, exchange: Exchange, problem: Problem) -> None:
        """Respond with ``problem``. A short body that is still to come is discarded, and a longer one closes the connection."""
        exchange.release_slot()
        exchange.environ[REJECTION] = problem.without_traceback()
        if exchange.body is None and (exchange.length is None or exchange.length >= MAX_DISCARDED_BYTES):
            exchange.response.force_close()

    # Responses

    def _respond(self, exchange: Exchange) -> None:
        """Write a rejection without a thread."""
        exchange.environ["wsgi.input"] = BytesIO()
        for chunk in self._middleware.respond(exchange.environ, exchange.response.start_response):
            exchange.response.write(chunk)
        exchange.response.close()

    async def _send(self, connection: Connection, exchange: Exchange) -> None:
        connection.send(exchange.output)
        exchange.output.clear()
        await connection.sent()

    def _run(self, client: Any, exchange: Exchange) -> bool:
        """Run the application, or continue its response. Return whether it is complete; else the client has to read first."""
        response, output = exchange.response, exchange.output
        is_paused = False
        try:
            if exchange.iterator is None:
                exchange.iterable = self._run_application(exchange)
                exchange.iterator = iter(exchange.iterable)
            for chunk in exchange.iterator:
                response.write(chunk)
                is_all = response.response_length is not None and response.sent >= response.response_length
                if (len(output) >= CONGESTED_BYTES or EVENT_STREAM in exchange.environ) and not is_all:
                    is_paused = True
                    return False
            response.close()
        except BaseException as error:
            response.force_close()
            if response.headers_sent:  # only closing the connection shows that the response is incomplete
                self.log.exception("Error handling request")
            else:
                self.handle_error(exchange.request, output, client, error)
        finally:
            if not is_paused:
                exchange.iterator = None
                if hasattr(exchange.iterable, "close"):
                    exchange.iterable.close()
                exchange.release_slot()
                exchange.environ.pop("wsgi.input", None)  # free the body now: the loop may collect the exchange later
        return True

    def _run_application(self, exchange: Exchange) -> Iterable[bytes]:
        exchange.environ["wsgi.input"] = BytesIO(exchange.body or b"")
        exchange.body = exchange.body and b""
        result: Iterable[bytes] = self.wsgi(exchange.environ, exchange.response.start_response)
        return result


def _replace_with_problem(output: ResponseBuffer, error: Exception) -> None:
    """Replace the HTML that gunicorn wrote about an invalid head by a problem, where its status has a code."""
    status_line, _, _ = output.partition(b"\r\n")
    if code := HEAD_CODES.get(int(status_line.split()[1])):
        body = Problem(code, f"The request line or the headers are invalid: {error}.").to_json(uuid.uuid4().hex)
        headers = f"Connection: close\r\nContent-Type: {PROBLEM_MEDIA_TYPE}\r\nContent-Length: {len(body)}"
        output[:] = b"%s\r\n%s\r\n\r\n%s" % (status_line, headers.encode(), body)


def _check_connection_headers(request: Any) -> None:
    """Apply what RFC 9112 requires and gunicorn's parser does not: a Host in HTTP/1.1, and ``close`` among other options."""
    names = {name for name, _ in request.headers}
    if request.version >= (1, 1) and "HOST" not in names:
        raise InvalidHeader("HOST")
    options = ",".join(value for name, value in request.headers if name == "CONNECTION")
    if "close" in [option.strip().lower() for option in options.split(",")]:
        request.force_close()

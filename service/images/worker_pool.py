"""A few threads of low priority behind a short queue: what pages show must not slow what /predict computes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, NamedTuple, TypeVar

from service.http.errors import Problem

NICENESS = 15  # the threads that compute answers have 10, and with 19 these would hardly move beside them
T = TypeVar("T")


class _Job(NamedTuple):
    key: Hashable
    work: Callable[[], Any]
    result: Future[Any]


class WorkerPool:
    """Up to ``threads`` threads, started where there is work and ended after ``idle_timeout_s`` without.

    ``max_queued`` jobs may wait, each for ``timeout_s`` at most. ``on_idle`` is called when the last thread ends, to
    give memory back. It can be made before a process forks, as no thread is started before there is work.
    """

    def __init__(
        self,
        name: str,
        *,
        threads: int,
        max_queued: int,
        timeout_s: float,
        idle_timeout_s: float = 60.0,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._most_threads, self._most_waiting, self._patience_s = threads, max_queued, timeout_s
        self._idle_s, self._when_idle = idle_timeout_s, on_idle
        self._waiting: deque[_Job] = deque()
        self._open: dict[Hashable, Future[Any]] = {}
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False
        self._changed = threading.Condition()

    def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """What ``work`` gives; who asks for the same ``key`` meanwhile gets the same result of the same work.

        Raises what ``work`` raises, and Problem where too many wait ("overloaded") or it took too long ("deadline_exceeded").
        """
        result = self._submit(key, work)
        try:
            return result.result(self._patience_s)
        except FutureTimeoutError:
            if result.done():  # the work's own
                raise
        raise Problem("deadline_exceeded", f"The {self.name} took over {self._patience_s:g} s; ask for it again later.")

    def close(self) -> None:
        """Finish what is being done, refuse what waits, and end the threads."""
        with self._changed:
            self._closed = True
            while self._waiting:
                self._finish(self._waiting.pop(), error=self._closing())
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _submit(self, key: Hashable, work: Callable[[], T]) -> Future[T]:
        with self._changed:
            if known := self._open.get(key):
                return known
            if self._closed:
                raise self._closing()
            if len(self._waiting) >= self._most_waiting:
                raise Problem(
                    "overloaded",
                    f"{len(self._waiting)} others wait for their {self.name}, and that is the most; ask again in a moment.",
                    headers={"Retry-After": "2"},
                )
            job = _Job(key, work, Future())
            self._open[key] = job.result
            self._waiting.append(job)
            if len(self._waiting) > self._idle and len(self._threads) < self._most_threads:
                thread = threading.Thread(target=self._work, name=self.name, daemon=True)
                self._threads.add(thread)
                thread.start()
            self._changed.notify()
        return job.result

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # of this thread alone, and of those that it starts
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while job := self._next():
            self._run(job)
            del job  # what it holds is not ours to keep while we wait

    def _run(self, job: _Job) -> None:
        given, error = None, None
        try:
            given = job.work()
        except BaseException as raised:
            error = raised
        with self._changed:
            self._finish(job, given=given, error=error)

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._waiting:
                self._idle += 1
                was_called = not self._closed and self._changed.wait(self._idle_s)
                self._idle -= 1
                if not (was_called or self._waiting):
                    self._threads.discard(threading.current_thread())
                    if not self._threads:
                        self._when_idle()
                    return None
            return self._waiting.popleft()

    def _finish(self, job: _Job, *, given: Any = None, error: BaseException | None = None) -> None:
        del self._open[job.key]
        if error:
            job.result.set_exception(error)
        else:
            job.result.set_result(given)

    def _closing(self) -> Problem:
        return Problem("overloaded", "The server is stopping; ask again in a moment.", headers={"Retry-After": "2"})

"""Run work for pages in a few threads of low priority, so that it does not slow down predictions."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from models.errors import UserError

NICENESS = 15  # inference threads have 10; at 19 these threads would hardly run while predictions are computed
T = TypeVar("T")


class PoolFullError(UserError):
    """Too many jobs are waiting, or the pool is closed. Retrying later helps."""


class PoolTimeoutError(UserError):
    """A job took too long."""


class WorkerPool:
    """A ThreadPoolExecutor with a bounded queue, a timeout, low priority, and one run per key at a time.

    Threads start with the first job, so that a pool can be created before the process forks.
    """

    def __init__(self, name: str, *, threads: int, max_queued: int, timeout_s: float) -> None:
        self.name = name
        self._max_jobs = threads + max_queued
        self._timeout_s = timeout_s
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=lower_priority)
        self._jobs: dict[Hashable, Future[Any]] = {}
        self._lock = threading.RLock()  # a job that is done already calls back in the thread that holds the lock
        self._is_closed = False

    def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """Run ``work`` and return its result. Concurrent calls with the same key share one run.

        Raises:
            PoolFullError: Too many jobs are waiting.
            PoolTimeoutError: The job took too long. It still runs to its end.
        """
        job = self._submit(key, work)
        try:
            return job.result(self._timeout_s)
        except CancelledError:
            raise self._closed_error() from None
        except FutureTimeoutError:
            if job.done():  # raised by the job
                raise
        raise PoolTimeoutError(f"The {self.name} took over {self._timeout_s:g} s. Try again later.")

    def close(self) -> None:
        """Finish the running jobs, cancel the waiting ones and end the threads."""
        with self._lock:
            self._is_closed = True
        self._executor.shutdown(cancel_futures=True)

    def _submit(self, key: Hashable, work: Callable[[], T]) -> Future[T]:
        with self._lock:
            if job := self._jobs.get(key):
                return job
            if self._is_closed:
                raise self._closed_error()
            if len(self._jobs) >= self._max_jobs:
                raise PoolFullError(f"Too many requests are waiting for the {self.name}. Try again in a moment.")
            job = self._jobs[key] = self._executor.submit(work)
            job.add_done_callback(lambda _: self._forget(key))
            return job

    def _forget(self, key: Hashable) -> None:
        with self._lock:
            del self._jobs[key]

    def _closed_error(self) -> PoolFullError:
        return PoolFullError("The server is stopping. Try again in a moment.")


def lower_priority() -> None:
    """Lower the priority of this thread, and of the threads and processes that it starts from now on."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)

"""Low priority, one run per key, a bounded queue and a timeout."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.images.worker_pool import NICENESS, PoolFullError, PoolTimeoutError, WorkerPool
from tests.helpers.server import poll


def make_pool(**options: Any) -> WorkerPool:
    return WorkerPool("test", **({"threads": 2, "max_queued": 4, "timeout_s": 300.0} | options))


def test_result_or_exception_of_the_job() -> None:
    workers = make_pool()
    assert workers.run("a", lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        workers.run("b", lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="its own"):
        workers.run("c", lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    workers.close()


def test_threads_have_a_low_priority() -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    workers = make_pool()
    assert workers.run("a", lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())) == NICENESS
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    workers.close()


def test_concurrent_calls_with_one_key_share_one_run() -> None:
    workers, calls, may_end = make_pool(), [], threading.Event()

    def work() -> int:
        calls.append(1)
        may_end.wait(300)
        return 5

    jobs = [workers._submit("same", work) for _ in range(24)]
    may_end.set()
    assert [each.result(300) for each in jobs] == [5] * 24
    assert len(calls) == 1
    workers.close()


def test_full_queue_and_timeout() -> None:
    workers, may_end, started = make_pool(threads=1, max_queued=1, timeout_s=0.05), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        may_end.wait(300)

    for key, error in (("first", PoolTimeoutError), ("second", PoolTimeoutError), ("third", PoolFullError)):
        with pytest.raises(error):
            workers.run(key, work)
        started.wait(300)
    may_end.set()
    poll(lambda: not workers._jobs)
    assert workers._submit("later", lambda: True).result(300)
    workers.close()


def test_close_finishes_running_jobs_and_cancels_waiting_ones() -> None:
    workers, may_end, started = make_pool(threads=1), threading.Event(), threading.Event()

    def work() -> int:
        started.set()
        may_end.wait(300)
        return 1

    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(workers.run, "a", work)
        assert started.wait(300)
        waiting = pool.submit(workers.run, "b", lambda: 2)
        poll(lambda: len(workers._jobs) == 2)
        closing = pool.submit(workers.close)
        assert isinstance(waiting.exception(300), PoolFullError)
        may_end.set()
        assert running.result(300) == 1
        closing.result(300)
    with pytest.raises(PoolFullError):
        workers.run("c", lambda: 3)

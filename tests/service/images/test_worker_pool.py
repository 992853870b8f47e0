"""The threads of low priority: one result for who asks for the same, a bound, a deadline, and an end when there is no work."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.http.errors import Problem
from service.images.worker_pool import NICENESS, WorkerPool
from tests.helpers.server import poll


def crew(**options: Any) -> WorkerPool:
    return WorkerPool("test", **({"threads": 2, "max_queued": 4, "timeout_s": 300.0} | options))


def test_it_gives_what_the_work_gives_or_raises() -> None:
    members = crew()
    assert members.run("a", lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        members.run("b", lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="its own"):
        members.run("c", lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    members.close()


def test_its_threads_give_way_to_all_others() -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    members = crew()
    assert members.run("a", lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())) == NICENESS
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    members.close()


def test_the_same_asked_for_by_many_is_done_once() -> None:
    members, calls, may_end = crew(), [], threading.Event()

    def work() -> int:
        calls.append(1)
        may_end.wait(300)
        return 5

    asked = [members._submit("same", work) for _ in range(24)]
    may_end.set()
    assert [each.result(300) for each in asked] == [5] * 24
    assert len(calls) == 1
    members.close()


def test_what_does_not_fit_the_queue_is_refused_and_what_takes_too_long_is_given_up() -> None:
    members, may_end, begun = crew(threads=1, max_queued=1, timeout_s=0.05), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(300)

    codes = []
    for key in ("first", "second", "third"):
        with pytest.raises(Problem) as caught:
            members.run(key, work)
        codes.append(caught.value.code)
        begun.wait(300)
    assert codes == ["deadline_exceeded", "deadline_exceeded", "overloaded"]
    assert "Retry-After" in caught.value.headers
    may_end.set()
    poll(lambda: not members._waiting)
    assert members._submit("later", lambda: True).result(300)
    members.close()


def test_idle_threads_end_say_so_and_come_back() -> None:
    ended = threading.Event()
    members = crew(threads=2, idle_timeout_s=0.01, on_idle=ended.set)
    for number in range(3):
        assert members.run(number, lambda: number) == number  # noqa: B023
        assert ended.wait(300)
        poll(lambda: not [thread for thread in threading.enumerate() if thread.name == "test"])
        ended.clear()


def test_closing_finishes_what_runs_and_refuses_what_waits() -> None:
    members, may_end, begun = crew(threads=1), threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        may_end.wait(300)
        return 1

    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(members.run, "a", work)
        assert begun.wait(300)
        waiting = pool.submit(members.run, "b", lambda: 2)
        poll(lambda: members._waiting)
        closing = pool.submit(members.close)
        assert isinstance(waiting.exception(300), Problem)
        may_end.set()
        assert running.result(300) == 1
        closing.result(300)
    with pytest.raises(Problem):
        members.run("c", lambda: 3)

"""Who is let in, who is told to come again, and when."""

from __future__ import annotations

import threading

import pytest

from service.http import admission as module
from service.http.admission import Admission
from service.http.errors import Problem


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def retry_after(admission: Admission, photos: int = 1) -> int:
    """Be refused; gives the seconds that it says to wait."""
    before = admission.in_flight
    with pytest.raises(Problem) as caught:
        admission.enter(photos)
    assert admission.in_flight == before
    assert (caught.value.code, caught.value.status) == ("overloaded", 503)
    seconds = int(caught.value.headers["Retry-After"])
    assert f"send it again in {seconds} s" in caught.value.detail
    return seconds


def test_it_counts_in_and_out() -> None:
    admission = Admission(3)
    admission.enter()
    admission.enter(2)
    assert admission.in_flight == 3
    retry_after(admission)
    admission.leave(2, answered=2)
    assert admission.in_flight == 1
    admission.enter(0)
    retry_after(admission, 3)
    admission.enter(2)
    assert admission.in_flight == 3


def test_a_request_of_no_more_photos_is_always_let_in() -> None:
    admission = Admission(1)
    admission.enter()
    admission.enter(0)
    assert admission.in_flight == 1


def test_the_limit_holds_when_many_come_at_once() -> None:
    admission, together = Admission(10), threading.Barrier(8)
    refused, most = 0, 0
    lock = threading.Lock()

    def come_and_go() -> None:
        nonlocal refused, most
        together.wait()
        for _ in range(300):
            try:
                admission.enter(3)
            except Problem:
                with lock:
                    refused += 1
                continue
            with lock:
                most = max(most, admission.in_flight)
            admission.leave(3, answered=3)

    threads = [threading.Thread(target=come_and_go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert admission.in_flight == 0
    assert most <= 10


def test_who_is_refused_is_told_when_half_of_the_house_will_be_empty(clock: Clock) -> None:
    admission = Admission(64)
    admission.enter(64)
    assert retry_after(admission) == 1  # nothing was measured yet
    for _ in range(20):  # four photos a second
        clock.now += 0.25
        admission.leave(1, answered=1)
        admission.enter(1)
    rate = 20 / (20 * 0.25 - 0.25)  # from the first that left on
    assert retry_after(admission) == -(-33 // rate) == 8
    assert retry_after(admission, 16) == -(-48 // rate) == 12


def test_the_wait_is_never_below_a_second_nor_over_a_minute(clock: Clock) -> None:
    admission = Admission(64)
    admission.enter(64)
    for _ in range(200):
        clock.now += 0.001
        admission.leave(1, answered=1)
        admission.enter(1)
    assert retry_after(admission) == 1
    slow = Admission(1000)
    slow.enter(1000)
    slow.leave(1, answered=1)
    slow.enter(1)
    clock.now += 5
    assert retry_after(slow) == 60


def test_what_was_measured_long_ago_does_not_count(clock: Clock) -> None:
    admission = Admission(64)
    admission.enter(64)
    admission.leave(1, answered=1)
    admission.enter(1)
    clock.now += 9
    assert retry_after(admission) == 60
    clock.now += 2
    assert retry_after(admission) == 1


def test_photos_without_an_answer_are_no_measure(clock: Clock) -> None:
    admission = Admission(2)
    admission.enter(2)
    for _ in range(5):
        clock.now += 5
        admission.leave(1, answered=0)
        admission.enter(1)
    assert retry_after(admission) == 1


def test_a_place_is_given_back_once() -> None:
    admission = Admission(2)
    one, other = admission.let_in(), admission.let_in()
    assert one is not None
    assert other is not None
    assert admission.let_in() is None
    one.give_back()
    one.give_back()
    assert admission.in_flight == 1
    assert admission.let_in()
    assert admission.is_full


@pytest.mark.parametrize("limit", [1, 4, 64])
def test_a_full_house_is_looked_at_often_enough_not_to_run_empty(clock: Clock, limit: int) -> None:
    admission = Admission(limit)
    assert admission.pause_s == 0
    admission.enter(limit)
    assert admission.pause_s == 0  # nothing was measured yet
    for _ in range(100):  # a hundred photos a second
        clock.now += 0.01
        admission.leave(1, answered=1)
        admission.enter(1)
    assert 0 < admission.pause_s <= 0.05
    assert admission.pause_s * 100 <= limit / 6  # photos that leave meanwhile
    admission.leave(1, answered=1)
    assert admission.pause_s == 0


def test_half_a_house_is_busy() -> None:
    admission = Admission(5)
    admission.enter(2)
    assert not admission.is_busy
    admission.enter(1)
    assert admission.is_busy

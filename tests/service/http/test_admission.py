"""Who is let in, who is told to come again, and when."""

from __future__ import annotations

import threading

import pytest

from service.http import admission as module
from service.http.admission import AdmissionController
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


def retry_after(admission: AdmissionController, photos: int = 1) -> int:
    """Be refused; gives the seconds that it says to wait."""
    before = admission.in_flight
    with pytest.raises(Problem) as caught:
        admission.acquire(photos)
    assert admission.in_flight == before
    assert (caught.value.code, caught.value.status) == ("overloaded", 503)
    seconds = int(caught.value.headers["Retry-After"])
    assert f"Retry in {seconds} s." in caught.value.detail
    return seconds


def test_it_counts_in_and_out() -> None:
    admission = AdmissionController(3)
    admission.acquire()
    admission.acquire(2)
    assert admission.in_flight == 3
    retry_after(admission)
    admission.release(2, completed=2)
    assert admission.in_flight == 1
    admission.acquire(0)
    retry_after(admission, 3)
    admission.acquire(2)
    assert admission.in_flight == 3


def test_a_request_of_no_more_photos_is_always_let_in() -> None:
    admission = AdmissionController(1)
    admission.acquire()
    admission.acquire(0)
    assert admission.in_flight == 1


def test_the_limit_holds_when_many_come_at_once() -> None:
    admission, together = AdmissionController(10), threading.Barrier(8)
    refused, most = 0, 0
    lock = threading.Lock()

    def come_and_go() -> None:
        nonlocal refused, most
        together.wait()
        for _ in range(300):
            try:
                admission.acquire(3)
            except Problem:
                with lock:
                    refused += 1
                continue
            with lock:
                most = max(most, admission.in_flight)
            admission.release(3, completed=3)

    threads = [threading.Thread(target=come_and_go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert admission.in_flight == 0
    assert most <= 10


def test_who_is_refused_is_told_when_half_of_the_house_will_be_empty(clock: Clock) -> None:
    admission = AdmissionController(64)
    admission.acquire(64)
    assert retry_after(admission) == 1  # nothing was measured yet
    for _ in range(20):  # four photos a second
        clock.now += 0.25
        admission.release(1, completed=1)
        admission.acquire(1)
    rate = 20 / (20 * 0.25 - 0.25)  # from the first that left on
    assert retry_after(admission) == -(-33 // rate) == 8
    assert retry_after(admission, 16) == -(-48 // rate) == 12


def test_the_wait_is_never_below_a_second_nor_over_a_minute(clock: Clock) -> None:
    admission = AdmissionController(64)
    admission.acquire(64)
    for _ in range(200):
        clock.now += 0.001
        admission.release(1, completed=1)
        admission.acquire(1)
    assert retry_after(admission) == 1
    slow = AdmissionController(1000)
    slow.acquire(1000)
    slow.release(1, completed=1)
    slow.acquire(1)
    clock.now += 5
    assert retry_after(slow) == 60


def test_what_was_measured_long_ago_does_not_count(clock: Clock) -> None:
    admission = AdmissionController(64)
    admission.acquire(64)
    admission.release(1, completed=1)
    admission.acquire(1)
    clock.now += 9
    assert retry_after(admission) == 60
    clock.now += 2
    assert retry_after(admission) == 1


def test_photos_without_an_answer_are_no_measure(clock: Clock) -> None:
    admission = AdmissionController(2)
    admission.acquire(2)
    for _ in range(5):
        clock.now += 5
        admission.release(1, completed=0)
        admission.acquire(1)
    assert retry_after(admission) == 1


def test_a_place_is_given_back_once() -> None:
    admission = AdmissionController(2)
    one, other = admission.try_acquire_slot(), admission.try_acquire_slot()
    assert one is not None
    assert other is not None
    assert admission.try_acquire_slot() is None
    one.release()
    one.release()
    assert admission.in_flight == 1
    assert admission.try_acquire_slot()
    assert admission.is_at_capacity


@pytest.mark.parametrize("limit", [1, 4, 64])
def test_a_full_house_is_looked_at_often_enough_not_to_run_empty(clock: Clock, limit: int) -> None:
    admission = AdmissionController(limit)
    assert admission.accept_pause_s == 0
    admission.acquire(limit)
    assert admission.accept_pause_s == 0  # nothing was measured yet
    for _ in range(100):  # a hundred photos a second
        clock.now += 0.01
        admission.release(1, completed=1)
        admission.acquire(1)
    assert 0 < admission.accept_pause_s <= 0.05
    assert admission.accept_pause_s * 100 <= limit / 6  # photos that leave meanwhile
    admission.release(1, completed=1)
    assert admission.accept_pause_s == 0

"""Admission of images up to the limit, and the Retry-After of rejected requests."""

from __future__ import annotations

import threading

import pytest

from service.http import admission as module
from service.http.admission import AdmissionController
from service.http.errors import Problem


class Clock:
    """A clock that the test sets."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def retry_after(admission: AdmissionController, count: int = 1) -> int:
    """Be rejected, and return the seconds to wait."""
    before = admission.in_flight
    with pytest.raises(Problem) as caught:
        admission.acquire(count)
    assert admission.in_flight == before
    assert (caught.value.code, caught.value.status) == ("overloaded", 503)
    seconds = int(caught.value.headers["Retry-After"])
    assert f"Retry in {seconds} s." in caught.value.detail
    return seconds


def test_images_are_counted() -> None:
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


def test_acquiring_no_more_images_always_succeeds() -> None:
    admission = AdmissionController(1)
    admission.acquire()
    admission.acquire(0)
    assert admission.in_flight == 1


def test_the_limit_holds_under_concurrency() -> None:
    admission, together = AdmissionController(10), threading.Barrier(8)
    rejected, highest = 0, 0
    lock = threading.Lock()

    def acquire_and_release() -> None:
        nonlocal rejected, highest
        together.wait()
        for _ in range(300):
            try:
                admission.acquire(3)
            except Problem:
                with lock:
                    rejected += 1
                continue
            with lock:
                highest = max(highest, admission.in_flight)
            admission.release(3, completed=3)

    threads = [threading.Thread(target=acquire_and_release) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert admission.in_flight == 0
    assert highest <= 10


def test_retry_after_is_when_half_of_the_capacity_is_free(clock: Clock) -> None:
    admission = AdmissionController(64)
    admission.acquire(64)
    assert retry_after(admission) == 1  # nothing measured yet
    for _ in range(20):  # 4 images per second
        clock.now += 0.25
        admission.release(1, completed=1)
        admission.acquire(1)
    rate = 20 / (20 * 0.25 - 0.25)  # since the first completed image
    assert retry_after(admission) == -(-33 // rate) == 8
    assert retry_after(admission, 16) == -(-48 // rate) == 12


def test_retry_after_is_between_a_second_and_a_minute(clock: Clock) -> None:
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


def test_old_measurements_are_ignored(clock: Clock) -> None:
    admission = AdmissionController(64)
    admission.acquire(64)
    admission.release(1, completed=1)
    admission.acquire(1)
    clock.now += 9
    assert retry_after(admission) == 60
    clock.now += 2
    assert retry_after(admission) == 1


def test_images_without_a_result_are_not_measured(clock: Clock) -> None:
    admission = AdmissionController(2)
    admission.acquire(2)
    for _ in range(5):
        clock.now += 5
        admission.release(1, completed=0)
        admission.acquire(1)
    assert retry_after(admission) == 1


def test_a_slot_is_released_once() -> None:
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
def test_the_accept_pause_at_capacity_is_short_enough(clock: Clock, limit: int) -> None:
    admission = AdmissionController(limit)
    assert admission.accept_pause_s == 0
    admission.acquire(limit)
    assert admission.accept_pause_s == 0  # nothing measured yet
    for _ in range(100):  # 100 images per second
        clock.now += 0.01
        admission.release(1, completed=1)
        admission.acquire(1)
    assert 0 < admission.accept_pause_s <= 0.05
    assert admission.accept_pause_s * 100 <= limit / 6  # images that complete meanwhile
    admission.release(1, completed=1)
    assert admission.accept_pause_s == 0

"""Admit images up to a limit, and compute when a rejected client should retry."""

from __future__ import annotations

import math
import threading
import time
from collections import deque

from prometheus_client import Gauge

from service.http.errors import Problem

RATE_WINDOW = 256  # completed images that the rate is measured on
RATE_MAX_AGE_S = 10.0
MAX_ACCEPT_PAUSE_S = 0.05


class Slot:
    """A slot for one image in flight. Releasing it a second time changes nothing."""

    def __init__(self, admission: AdmissionController) -> None:
        self._admission: AdmissionController | None = admission

    def release(self) -> None:
        if self._admission:
            self._admission.release()
            self._admission = None


class AdmissionController:
    """Count the images in flight, and reject those above the limit.

    A request counts as one image when it is admitted, and as its number of images once that is known.

    Args:
        limit: Max. images in flight.
        gauge: A metric that follows the count.
    """

    def __init__(self, limit: int, *, gauge: Gauge | None = None) -> None:
        self._limit = limit
        self._gauge = gauge
        self._in_flight = 0
        self._lock = threading.Lock()
        self._completed: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def is_at_capacity(self) -> bool:
        return self._in_flight >= self._limit

    @property
    def accept_pause_s(self) -> float:
        """How long new requests can wait at capacity without the server going idle; 0 below capacity."""
        if not self.is_at_capacity:
            return 0.0
        with self._lock:
            rate = self._rate()
        return min(MAX_ACCEPT_PAUSE_S, self._limit / rate / 8) if rate else 0.0

    def try_acquire_slot(self) -> Slot | None:
        """Return a slot for one image, or None at capacity."""
        return Slot(self) if self._try_acquire(1) else None

    def acquire(self, count: int = 1) -> None:
        """Count ``count`` more images as in flight. Raises Problem if they exceed the limit."""
        if not self._try_acquire(count):
            raise self.overload_problem(count)

    def overload_problem(self, count: int = 1) -> Problem:
        """Return the problem of a request for ``count`` images that is rejected now."""
        with self._lock:
            wait_s = self._wait_s(count)
        return Problem(
            "overloaded",
            f"The server is at capacity ({self._in_flight} of {self._limit} images in flight). Retry in {wait_s} s.",
            headers={"Retry-After": str(wait_s)},
        )

    def release(self, count: int = 1, *, completed: int = 0) -> None:
        """Count ``count`` images as no longer in flight, ``completed`` of them with a result."""
        with self._lock:
            self._add(-count)
            if completed:
                self._completed.append((time.monotonic(), completed))

    def _try_acquire(self, count: int) -> bool:
        with self._lock:
            if self._in_flight + count > self._limit:
                return False
            self._add(count)
            return True

    def _add(self, count: int) -> None:
        self._in_flight += count
        if self._gauge and count:
            self._gauge.inc(count)

    def _wait_s(self, count: int) -> int:
        """Return after how many seconds, 1 to 60, there is room for ``count`` more images at the measured rate."""
        rate = self._rate()
        excess = self._in_flight + count - self._limit
        # Until half of the capacity is free: other rejected clients retry by then, too.
        return min(60, max(1, math.ceil((excess + self._limit / 2) / rate))) if rate else 1

    def _rate(self) -> float:
        """Return the images completed per second lately; 0 if none were."""
        now = time.monotonic()
        recent = [(at, count) for at, count in self._completed if now - at < RATE_MAX_AGE_S]
        if not recent:
            return 0.0
        return sum(count for _, count in recent) / max(now - recent[0][0], 1e-3)

"""How many photos are in the house, and when to say no: before a body is read, for a fraction of an answer's work."""

from __future__ import annotations

import math
import threading
import time
from collections import deque

from prometheus_client import Gauge

from service.http.errors import Problem

RATE_WINDOW = 256  # answered photos that the drain rate is measured on
RATE_MAX_AGE_S = 10.0
MAX_ACCEPT_PAUSE_S = 0.05


class Slot:
    """One photo's place in the house. Whoever has it gives it back; a second time changes nothing."""

    def __init__(self, admission: AdmissionController) -> None:
        self._admission: AdmissionController | None = admission

    def release(self) -> None:
        if self._admission:
            self._admission.release()
            self._admission = None


class AdmissionController:
    """Count photos in, count them out, and refuse those over ``limit`` with the seconds until there is room.

    A request counts as one photo from its arrival on, and as what it holds once that is known. ``gauge`` follows the count.
    """

    def __init__(self, limit: int, *, gauge: Gauge | None = None) -> None:
        self._limit = limit
        self._gauge = gauge
        self._inside = 0
        self._lock = threading.Lock()
        self._left: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)

    @property
    def in_flight(self) -> int:
        return self._inside

    @property
    def is_at_capacity(self) -> bool:
        return self._inside >= self._limit

    @property
    def is_busy(self) -> bool:
        """Whether it is worth a look who comes: half of the house is full."""
        return self._inside * 2 >= self._limit

    @property
    def accept_pause_s(self) -> float:
        """How long those who come to a full house can wait for a look, without it running empty meanwhile; 0: not at all."""
        if not self.is_at_capacity:
            return 0.0
        with self._lock:
            rate = self._rate()
        return min(MAX_ACCEPT_PAUSE_S, self._limit / rate / 8) if rate else 0.0

    def try_acquire_slot(self) -> Slot | None:
        """A place for one photo; None where there is none."""
        return Slot(self) if self._has_taken(1) else None

    def acquire(self, photos: int = 1) -> None:
        """Count ``photos`` in; raises Problem where there is no room for them."""
        if not self._has_taken(photos):
            raise self.overload_problem(photos)

    def overload_problem(self, photos: int = 1) -> Problem:
        """What they are told for whom there is no room."""
        with self._lock:
            wait_s = self._wait_s(photos)
        return Problem(
            "overloaded",
            f"{self._inside} photos are waiting and {self._limit} is the most; send it again in {wait_s} s.",
            headers={"Retry-After": str(wait_s)},
        )

    def release(self, photos: int = 1, *, completed: int = 0) -> None:
        """Count ``photos`` out, ``completed`` of them with an answer."""
        with self._lock:
            self._count(-photos)
            if completed:
                self._left.append((time.monotonic(), completed))

    def _has_taken(self, photos: int) -> bool:
        """Count ``photos`` in if there is room for all of them."""
        with self._lock:
            if self._inside + photos > self._limit:
                return False
            self._count(photos)
            return True

    def _count(self, more: int) -> None:
        self._inside += more
        if self._gauge and more:
            self._gauge.inc(more)

    def _wait_s(self, photos: int) -> int:
        """Whole seconds until ``photos`` more have room at the measured rate, 1 to 60."""
        rate = self._rate()
        too_many = self._inside + photos - self._limit
        # Not the first that leaves: by then the others that were refused are here again. Half of the house has to be empty.
        return min(60, max(1, math.ceil((too_many + self._limit / 2) / rate))) if rate else 1

    def _rate(self) -> float:
        """Photos answered a second, over the last ones; 0 where none was answered lately."""
        now = time.monotonic()
        recent = [(at, photos) for at, photos in self._left if now - at < RATE_MAX_AGE_S]
        if not recent:
            return 0.0
        return sum(photos for _, photos in recent) / max(now - recent[0][0], 1e-3)

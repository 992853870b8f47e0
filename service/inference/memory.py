"""Have glibc give large blocks back to the system as soon as they are freed."""

from __future__ import annotations

import contextlib
import ctypes

M_MMAP_THRESHOLD = -3  # of malloc.h
THRESHOLD_BYTES = 4 << 20


def return_large_blocks() -> None:
    """Map every block of THRESHOLD_BYTES or more by itself, so that its memory goes back when it is freed.

    That is glibc's way at first, but it raises the threshold to the size of the largest block that was freed: after one body
    of 20 MB, bodies and pixels come from heaps that keep what they once held. Another C library is left as it is.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES)

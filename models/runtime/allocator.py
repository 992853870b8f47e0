"""Set up the C library's memory allocator for programs that handle many images. Does not import torch."""

from __future__ import annotations

import contextlib
import ctypes

M_MMAP_THRESHOLD = -3  # value in malloc.h
LARGE_BLOCK_BYTES = 4 << 20


def return_large_blocks() -> None:
    """Have glibc return large blocks to the system as soon as they are freed.

    It does so at first, but raises its threshold to the size of the largest block that was freed: after one body of 20 MB,
    bodies and pixels would come from heaps that keep their memory. Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def return_free_memory() -> None:
    """Have glibc return the free memory of its heaps to the system, also between blocks that are in use."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)

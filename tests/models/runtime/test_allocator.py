"""The C library returns memory to the system."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import pytest

from models.runtime.allocator import return_free_memory

BLOCK_BYTES, BLOCKS = 100_000, 400


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide by themselves")
def test_free_memory_between_used_blocks_is_returned() -> None:
    blocks = [np.ones(BLOCK_BYTES, np.uint8) for _ in range(BLOCKS)]
    used = blocks[::20]  # the heap cannot shrink from its end
    del blocks
    before = resident_bytes()
    return_free_memory()
    assert before - resident_bytes() > BLOCK_BYTES * BLOCKS / 2
    assert len(used) == BLOCKS / 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

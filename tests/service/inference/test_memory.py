"""Memory that a worker took for a large body goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import sys
from service.inference.memory import return_large_blocks
if sys.argv[1] == "set":
    return_large_blocks()
for _ in range(3):
    body = b"x" * (20 << 20)  # the first is mapped; once it is freed, glibc takes the others from a heap
    above = [b"y" * 100_000 for _ in range(50)]  # lie behind it there, and keep the heap from shrinking
    del body
    keep = above
print(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
"""


def rss_mb(mode: str) -> float:
    done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc only")
def test_large_blocks_go_back() -> None:
    assert rss_mb("set") < rss_mb("unset") - 15

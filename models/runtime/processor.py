"""The instruction sets of this processor that decide how fast a numeric precision is."""

from __future__ import annotations

import functools
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
# In x86 and in Arm names. AVX-512 without VNNI computes int8 in float32's time.
RELEVANT = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
)
INT8 = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Return the relevant instruction sets of this processor, in a fixed order. Empty if the system does not list them."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    for line in lines:
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            own = set(values.split())
            return tuple(flag for flag in RELEVANT if flag in own)
    return ()

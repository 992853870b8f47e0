"""The name of this processor, and its instruction sets that decide how fast a numeric precision is."""

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
    own = set((_cpu_info("flags") or _cpu_info("Features")).split())
    return tuple(flag for flag in RELEVANT if flag in own)


def processor_name() -> str:
    """Return the name of this processor, such as "Intel(R) Xeon(R) Processor @ 2.80GHz"."""
    return _cpu_info("model name") or "unknown processor"


def _cpu_info(field: str) -> str:
    """Return a field of the first CPU, or "" if the system does not list it."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    rows = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in rows if name.strip() == field), "")

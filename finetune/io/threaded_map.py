"""Map a function over items in threads, with results in order.

Pillow releases the GIL while it decodes, so threads are enough to use all CPUs.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cpus() -> int:
    """Return the number of CPUs for this process, divided among torchrun's processes on this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // _local_world_size())


def engine_threads() -> int:
    """Return the thread limit for inference engines: 0 (no limit), or the CPUs of this process under torchrun."""
    return available_cpus() if _local_world_size() > 1 else 0


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def threaded_map(
    work: Callable[[Item], Result], items: Iterable[Item], *, workers: int, buffer_size: int = 64
) -> Iterator[Result]:
    """Map ``work`` over ``items`` in threads.

    Args:
        work: Function to apply.
        items: Its inputs, consumed lazily.
        workers: Number of threads; 0 for one per CPU.
        buffer_size: Maximum number of pending results.

    Yields:
        The results, in the order of the items.
    """
    pool = ThreadPoolExecutor(workers or available_cpus(), thread_name_prefix="decode")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > buffer_size:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of ``size`` items; the last may be shorter. (itertools.batched needs Python 3.12.)"""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

"""Work ahead in threads, hand over in order. Pillow decodes outside Python's lock, so threads keep all processors busy."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cpus() -> int:
    """The processors that this process may use: where torchrun started several on this machine, its share of them."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // _local_world_size())


def engine_threads() -> int:
    """How many threads an engine may take: 0, all that it likes, or this process's share of the machine."""
    return available_cpus() if _local_world_size() > 1 else 0


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def threaded_map(
    work: Callable[[Item], Result], items: Iterable[Item], *, workers: int, buffer_size: int = 64
) -> Iterator[Result]:
    """``map(work, items)`` in ``workers`` threads (0: one a CPU), at most ``buffer_size`` results before they are taken."""
    pool = ThreadPoolExecutor(workers or available_cpus(), thread_name_prefix="decode")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > buffer_size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items, the last one shorter (itertools.batched is Python 3.12's)."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

"""Interleaved timing for fair comparisons: other load on the machine affects all candidates equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def time_interleaved(calls: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Time several calls in turn, once per round.

    Args:
        calls: The calls by name.
        rounds: The number of rounds.

    Returns:
        The durations of each call in seconds, one per round.
    """
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            durations[name].append(time.perf_counter() - start)
    return durations

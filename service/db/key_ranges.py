"""An order cut into stretches: which parts of it can hold a filter's photos at all, and how many each holds.

A cell knows the lowest and the highest of what its photos are sorted by. Where the ranges of a filter's cells lie apart, what
is between them need not be read, and a whole stretch is passed over by its number of photos. A far page so costs what one
stretch costs: sorted by confidence a per cent, by loss or margin about as little, by name a folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class KeyRange:
    """What has a sort key from ``low`` to ``high``, both included, or any where they are None.

    ``count`` are the filter's there, None before they are counted.
    """

    low: Any
    high: Any
    count: int | None
    bucket_ids: list[int] = field(default_factory=list)  # the ids of the filter's that have photos here


def merge_ranges(ranges: Iterable[tuple[Any, Any, int, int]]) -> list[KeyRange]:
    """Segments in ascending order, none of which touches the next, from (low, high, photos, id) of cells."""
    found: list[KeyRange] = []
    for low, high, count, id_ in sorted(ranges):
        if found and low <= found[-1].high:
            last = found[-1]
            last.high = max(last.high, high)
            last.count = (last.count or 0) + count
            last.bucket_ids.append(id_)
        else:
            found.append(KeyRange(low, high, count, [id_]))
    return found

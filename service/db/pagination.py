"""Paginate a filter's photos in a sort order: their ids page by page, and the neighbors of one of them.

A bucket stores the lowest and highest sort key of its photos. If the ranges of the filter's buckets do not touch, the keys
between them need not be read, and a complete range is skipped by its number of photos. The cost of a distant page is
therefore that of one range: sorted by confidence one percent, sorted by name one folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select, tuple_

from service.db.filter import Filter
from service.db.schema import RANGE_COLUMNS, buckets, predictions

SORT_COLUMNS = {
    "loss": predictions.c.loss,
    "confidence": predictions.c.confidence,
    "margin": predictions.c.margin,
    "outlier": func.coalesce(predictions.c.ood_score, -1.0),  # photos without a score are the least unlike ones
    "newest": predictions.c.id,  # ids ascend in the order of arrival
    "name": predictions.c.photo,
    "random": predictions.c.shuffle,
}
SMALL_RESULT = 4_000  # up to this many photos, sorting all photos of the buckets is faster than scanning the sort index
MIN_IMAGES_PER_BUCKET = 50  # below this average, reading the buckets' ranges costs more than it saves


@dataclass
class KeyRange:
    """Sort keys from ``low`` to ``high``, both included; None stands for no limit.

    ``count`` is the number of the filter's photos in the range, None until it is counted. ``bucket_ids`` are the filter's
    buckets that have photos in the range.
    """

    low: Any
    high: Any
    count: int | None
    bucket_ids: list[int] = field(default_factory=list)


def merge_ranges(ranges: Iterable[tuple[Any, Any, int, int]]) -> list[KeyRange]:
    """Merge the (low, high, count, bucket id) of buckets to ascending ranges that do not touch each other."""
    merged: list[KeyRange] = []
    for low, high, count, id_ in sorted(ranges):
        if merged and low <= merged[-1].high:
            last = merged[-1]
            last.high = max(last.high, high)
            last.count = (last.count or 0) + count
            last.bucket_ids.append(id_)
        else:
            merged.append(KeyRange(low, high, count, [id_]))
    return merged


@dataclass(frozen=True, eq=False)
class Paginator:
    """The photos of some buckets of one model, in a filter's order.

    Attributes:
        bucket_counts: The number of the filter's photos by bucket id.
        model_total: The number of all photos of the model.
        bucket_total: The number of all buckets of the model.
        restrictions: Further conditions of the filter's photos, if those are not all photos of the buckets.
        use_restrictions_first: Whether the restrictions select few photos, so that these are read and then sorted.
    """

    connection: Connection
    model_id: int
    filters: Filter
    bucket_counts: Mapping[int, int]
    model_total: int
    bucket_total: int
    restrictions: Sequence[ColumnElement[bool]] = ()
    use_restrictions_first: bool = False

    def ids(self, *, limit: int | None = None, offset: int = 0) -> list[int]:
        """Return the ids of the photos in order."""
        ids: list[int] = []
        ranges = self._ranges()
        if offset > SMALL_RESULT:
            self._count_random(ranges)
        for range_ in ranges:
            if range_.count is not None and range_.count <= offset:
                offset -= range_.count
                continue
            more = self._page(range_, limit=None if limit is None else limit - len(ids), offset=offset)
            ids += more
            if limit is not None and len(ids) >= limit:
                break
            offset = 0 if more else max(0, offset - self._count(range_))
        return ids

    def neighbors(self, key: Any, id_: int) -> tuple[int, list[int], list[int]]:
        """Locate a photo in the order.

        Args:
            key: The photo's sort key.
            id_: The photo's id. The photo need not match the filter.

        Returns:
            The number of photos before it, the id of the previous one and the id of the next one (lists of at most one).
        """
        earlier, own, later = self._locate(key)
        count = sum(map(self._count, earlier))
        previous: list[int] = []
        following: list[int] = []
        if own:
            position, this = tuple_(self._column, predictions.c.id), tuple_(key, id_)
            lower = replace(own, high=key, count=None), position < this
            higher = replace(own, low=key, count=None), position > this
            before, after = (lower, higher) if self._is_ascending else (higher, lower)
            count += self._count(*before)
            previous = self._select(*before, limit=1, backwards=True)
            following = self._select(*after, limit=1)
        for range_ in reversed(earlier):
            previous = previous or self._select(range_, limit=1, backwards=True)
        for range_ in later:
            following = following or self._select(range_, limit=1)
        return count, previous, following

    def contains(self, id_: int) -> bool:
        """Return whether a photo matches the filter."""
        in_buckets = (predictions.c.bucket_id + 0).in_(list(self.bucket_counts))
        this = select(predictions.c.id).where(predictions.c.id == id_, in_buckets, *self.restrictions)
        return self.connection.execute(this).first() is not None

    @property
    def _column(self) -> ColumnElement[Any]:
        return SORT_COLUMNS[self.filters.sort]

    @property
    def _is_random(self) -> bool:
        return self.filters.sort == "random"

    @property
    def _is_ascending(self) -> bool:
        return self.filters.order == "asc"

    @cached_property
    def _total(self) -> int:
        return sum(self.bucket_counts.values())

    @property
    def _use_bucket_index(self) -> bool:
        """Whether photos are looked up by their buckets. That index has the random order in it, so that more are few there."""
        limit = self.model_total // 10
        return self._total <= (limit if self._is_random else min(SMALL_RESULT, limit))

    def _ranges(self) -> list[KeyRange]:
        """Return the ranges of keys that have photos, in the filter's order.

        A random order is the photos' shuffled order, which starts at a position that depends on the seed and wraps around.
        """
        if self._is_random:
            start = self.filters.seed * 2_654_435_761 % 2**31  # Knuth's multiplier: successive seeds start far apart
            ids = list(self.bucket_counts)
            ranges = [KeyRange(start, 2**31 - 1, None, ids), KeyRange(0, start - 1, None, ids)]
        elif (
            self._column.name not in RANGE_COLUMNS
            or self.use_restrictions_first
            or self._use_bucket_index
            or self.model_total < MIN_IMAGES_PER_BUCKET * self.bucket_total
        ):
            ranges = [KeyRange(None, None, self._total, list(self.bucket_counts))]
        else:
            name = self._column.name
            columns = buckets.c.id, buckets.c[f"{name}_low"], buckets.c[f"{name}_high"]
            rows = self.connection.execute(select(*columns).where(buckets.c.model_id == self.model_id, buckets.c.images > 0))
            counts = self.bucket_counts
            ranges = merge_ranges((low, high, counts[id_], id_) for id_, low, high in rows if id_ in counts)
        return ranges if self._is_ascending else ranges[::-1]

    def _locate(self, key: Any) -> tuple[list[KeyRange], KeyRange | None, list[KeyRange]]:
        """Return the ranges before a key, the one that contains it, and those after it."""
        ranges = self._ranges()
        for number, range_ in enumerate(ranges):
            if range_.low is None or range_.low <= key <= range_.high:
                return ranges[:number], range_, ranges[number + 1 :]
        lower, higher = [r for r in ranges if r.high < key], [r for r in ranges if r.low > key]
        return (lower, None, higher) if self._is_ascending else (higher, None, lower)

    def _count_random(self, ranges: list[KeyRange]) -> None:
        """Count the first half of a random order; the second half has the rest."""
        if self._is_random:
            first, second = ranges
            second.count = self._total - self._count(first)

    def _page(self, range_: KeyRange, *, limit: int | None, offset: int) -> list[int]:
        """Select as ``_select`` does, but from the nearer end of the range if its length is known."""
        if limit is None or range_.count is None or offset <= range_.count // 2:
            return self._select(range_, limit=limit, offset=offset)
        limit = min(limit, range_.count - offset)
        return self._select(range_, limit=limit, offset=range_.count - offset - limit, backwards=True)[::-1]

    def _select(
        self, range_: KeyRange, *more: ColumnElement[bool], limit: int | None, offset: int = 0, backwards: bool = False
    ) -> list[int]:
        keys: list[ColumnElement[Any]] = [self._column, predictions.c.id]
        if self._is_ascending == backwards:
            keys = [key.desc() for key in keys]
        conditions = self._conditions(range_, by_bucket=self._use_bucket_index)
        rows = select(predictions.c.id).where(*conditions, *more).order_by(*keys).limit(limit).offset(offset)
        return list(self.connection.execute(rows).scalars())

    def _count(self, range_: KeyRange, *more: ColumnElement[bool]) -> int:
        """Count the photos of a range once."""
        if range_.count is None:
            conditions = self._conditions(range_, by_bucket=self._use_bucket_index or self._is_random)
            rows = select(func.count()).select_from(predictions).where(*conditions, *more)
            range_.count = int(self.connection.execute(rows).scalar_one())
        return range_.count

    def _conditions(self, range_: KeyRange, *, by_bucket: bool) -> list[ColumnElement[bool]]:
        """Return the conditions for photos of a range, worded for the index of the buckets or for that of the sort key."""
        conditions: list[ColumnElement[bool]] = []
        if range_.low is not None:
            conditions.append(self._column >= range_.low)
        if range_.high is not None:
            conditions.append(self._column <= range_.high)
        conditions += self.restrictions
        if self.use_restrictions_first:  # + 0 keeps the planner from using another index than that of the restrictions
            conditions.append((predictions.c.bucket_id + 0).in_(range_.bucket_ids))
        elif len(self.bucket_counts) == self.bucket_total:
            conditions.append(predictions.c.model_id == self.model_id)
        elif by_bucket:
            conditions.append(predictions.c.bucket_id.in_(range_.bucket_ids))
        else:  # + 0 keeps the planner, which does not know how many photos the buckets have, from using the buckets' index
            conditions += [predictions.c.model_id == self.model_id, (predictions.c.bucket_id + 0).in_(range_.bucket_ids)]
        return conditions

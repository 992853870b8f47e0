"""Where in an order the photos of a filter are: their ids, page by page, and what comes before and after one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, func, select, tuple_

from service.db.filter import Filter
from service.db.key_ranges import KeyRange, merge_ranges
from service.db.schema import buckets, predictions

SORT_COLUMNS = {
    "loss": predictions.c.loss,
    "confidence": predictions.c.confidence,
    "margin": predictions.c.margin,
    "name": predictions.c.photo,
    "random": predictions.c.shuffle,
}
SMALL_RESULT = 4_000  # photos that are sooner found through their cells and sorted than met in the order's own index
MIN_IMAGES_PER_BUCKET = 50  # photos to a cell: where there are fewer, to read how far the cells reach costs more than it spares


@dataclass(frozen=True, eq=False)
class Paginator:
    """The photos of one model that are in some cells: ``bucket_counts`` says how many of them each cell's id has.

    ``model_total`` is the number of the model's photos, and ``bucket_total`` that of its cells. ``restrict_to`` selects the
    ids that are to be left, where not all photos of the cells are.
    """

    connection: Connection
    model_id: int
    filters: Filter
    bucket_counts: Mapping[int, int]
    model_total: int
    bucket_total: int
    restrict_to: Select[Any] | None = None

    def ids(self, *, limit: int | None = None, offset: int = 0) -> list[int]:
        found: list[int] = []
        segments = self._segments()
        if offset > SMALL_RESULT:
            self._count_random(segments)
        for segment in segments:
            if segment.count is not None and segment.count <= offset:
                offset -= segment.count
                continue
            more = self._page(segment, limit=None if limit is None else limit - len(found), offset=offset)
            found += more
            if limit is not None and len(found) >= limit:
                break
            offset = 0 if more else max(0, offset - self._count(segment))
        return found

    def neighbors(self, key: Any, id_: int) -> tuple[int, list[int], list[int]]:
        """How many ids come before the one with this sort key, the last of those, and the first after it, if there are any."""
        earlier, own, later = self._place(key)
        count = sum(map(self._count, earlier))
        previous: list[int] = []
        following: list[int] = []
        if own:
            here, this = tuple_(self._column, predictions.c.id), tuple_(key, id_)
            lower = replace(own, high=key, count=None), here < this
            higher = replace(own, low=key, count=None), here > this
            before, after = (lower, higher) if self._is_ascending else (higher, lower)
            count += self._count(*before)
            previous = self._select(*before, limit=1, backwards=True)
            following = self._select(*after, limit=1)
        for segment in reversed(earlier):
            previous = previous or self._select(segment, limit=1, backwards=True)
        for segment in later:
            following = following or self._select(segment, limit=1)
        return count, previous, following

    def contains(self, id_: int) -> bool:
        cell = (predictions.c.bucket_id + 0).in_(list(self.bucket_counts))
        this = select(predictions.c.id).where(predictions.c.id == id_, cell)
        if self.restrict_to is not None:
            this = this.where(predictions.c.id.in_(self.restrict_to))
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
    def _are_few(self) -> bool:
        """Whether the photos are found through their cells. As those' index has the random order in it, many are few there."""
        most = self.model_total // 10
        return self._total <= (most if self._is_random else min(SMALL_RESULT, most))

    def _segments(self) -> list[KeyRange]:
        """The parts of the order that have photos, first to last.

        A random order is the photos' own shuffled one, begun at a place that the seed gives and then round.
        """
        if self._is_random:
            start = self.filters.seed * 2_654_435_761 % 2**31  # Knuth's multiplier: near seeds begin far apart
            ids = list(self.bucket_counts)
            segments = [KeyRange(start, 2**31 - 1, None, ids), KeyRange(0, start - 1, None, ids)]
        elif self._are_few or self.model_total < MIN_IMAGES_PER_BUCKET * self.bucket_total:
            segments = [KeyRange(None, None, self._total, list(self.bucket_counts))]
        else:
            name = SORT_COLUMNS[self.filters.sort].name
            columns = buckets.c.id, buckets.c[f"{name}_low"], buckets.c[f"{name}_high"]
            rows = self.connection.execute(select(*columns).where(buckets.c.model_id == self.model_id, buckets.c.images > 0))
            photos = self.bucket_counts
            segments = merge_ranges((low, high, photos[id_], id_) for id_, low, high in rows if id_ in photos)
        return segments if self._is_ascending else segments[::-1]

    def _place(self, key: Any) -> tuple[list[KeyRange], KeyRange | None, list[KeyRange]]:
        """The segments before a key, the one around it, and those after it."""
        segments = self._segments()
        for number, segment in enumerate(segments):
            if segment.low is None or segment.low <= key <= segment.high:
                return segments[:number], segment, segments[number + 1 :]
        lower, higher = [s for s in segments if s.high < key], [s for s in segments if s.low > key]
        return (lower, None, higher) if self._is_ascending else (higher, None, lower)

    def _count_random(self, segments: list[KeyRange]) -> None:
        """Count one half of a random order; the other one has the rest."""
        if self._is_random:
            first, second = segments
            second.count = self._total - self._count(first)

    def _page(self, segment: KeyRange, *, limit: int | None, offset: int) -> list[int]:
        """As ``_select``, from the nearer end where the other one's place is known."""
        if limit is None or segment.count is None or offset <= segment.count // 2:
            return self._select(segment, limit=limit, offset=offset)
        limit = min(limit, segment.count - offset)
        return self._select(segment, limit=limit, offset=segment.count - offset - limit, backwards=True)[::-1]

    def _select(
        self, segment: KeyRange, *more: ColumnElement[bool], limit: int | None, offset: int = 0, backwards: bool = False
    ) -> list[int]:
        keys: list[ColumnElement[Any]] = [self._column, predictions.c.id]
        if self._is_ascending == backwards:
            keys = [key.desc() for key in keys]
        conditions = self._conditions(segment, by_cell=self._are_few)
        found = select(predictions.c.id).where(*conditions, *more).order_by(*keys).limit(limit).offset(offset)
        return list(self.connection.execute(found).scalars())

    def _count(self, segment: KeyRange, *more: ColumnElement[bool]) -> int:
        """The segment's photos, counted once unless there are ``more`` conditions."""
        if segment.count is None:
            conditions = self._conditions(segment, by_cell=self._are_few or self._is_random)
            found = select(func.count()).select_from(predictions).where(*conditions, *more)
            segment.count = int(self.connection.execute(found).scalar_one())
        return segment.count

    def _conditions(self, segment: KeyRange, *, by_cell: bool) -> list[ColumnElement[bool]]:
        """What the photos of a segment have, said so that they are looked up in the cells' index or in the order's own."""
        chosen: list[ColumnElement[bool]] = []
        if segment.low is not None:
            chosen.append(self._column >= segment.low)
        if segment.high is not None:
            chosen.append(self._column <= segment.high)
        if len(self.bucket_counts) == self.bucket_total:
            chosen.append(predictions.c.model_id == self.model_id)
        elif by_cell:
            chosen.append(predictions.c.bucket_id.in_(segment.bucket_ids))
        else:  # + 0 keeps a planner, which cannot know how many photos the cells have, from going through them
            chosen += [predictions.c.model_id == self.model_id, (predictions.c.bucket_id + 0).in_(segment.bucket_ids)]
        if self.restrict_to is not None:
            chosen.append(predictions.c.id.in_(self.restrict_to))
        return chosen

"""Query the photos of a filter: counts, pages in a stable order, single photos and their neighbors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from sqlalchemy import Connection, func, select

from models.errors import list_names
from service.db import pagination
from service.db.aggregates import FacetCounts, count_buckets
from service.db.errors import InvalidFilterError, RecordNotFoundError
from service.db.facets import FacetValue, count_by_bucket, count_values, filter_by_column, list_values
from service.db.filter import UNLABELED, Filter
from service.db.ingest import DIMENSIONS
from service.db.model_comparison import select_changed
from service.db.pagination import SORT_COLUMNS, Paginator
from service.db.records import Bucket, DecisionRecord, ModelRecord, PredictionRecord
from service.db.schema import buckets, current_reviews, models, predictions
from service.db.text import is_storable, match_name, unicode_forms


class PredictionQuery:
    """The photos of one filter, on one connection."""

    def __init__(self, connection: Connection, filters: Filter, *, same_model_as: PredictionQuery | None = None) -> None:
        """Count the photos that match a filter.

        Args:
            connection: A transaction.
            filters: The filter.
            same_model_as: A query of the same model, whose buckets need not be read again.

        Raises:
            RecordNotFoundError: The database does not know the model.
            InvalidFilterError: The model does not have a class of the filter.
        """
        self.connection = connection
        self.model: ModelRecord = same_model_as.model if same_model_as else get_model(connection, filters.model)
        self.filters = filters = _match_classes(filters, self.model)
        self.facet_values: Sequence[FacetValue] = (
            same_model_as.facet_values if same_model_as else list_values(connection, self.model.id)
        )
        self._columns = filter_by_column(self.facet_values, filters.facets)
        self._changed = (
            [select_changed(self.model, get_model(connection, filters.baseline), filters.change)] if filters.change else []
        )
        image_counts = self._count_restricted()
        self._restricted_total = None if image_counts is None else sum(image_counts.values())
        self.buckets: Sequence[Bucket] = same_model_as.buckets if same_model_as else load_buckets(connection, self.model)
        self.model_total = sum(bucket.images for bucket in self.buckets)
        self.counts: FacetCounts = count_buckets(self.buckets, filters, image_counts=image_counts)
        images = {bucket.id: bucket.images for bucket in self.buckets} if image_counts is None else image_counts
        self._bucket_counts = {id_: images[id_] for id_ in self.counts.bucket_ids}

    def with_connection(self, connection: Connection) -> PredictionQuery:
        """Return the same query on another connection, without counting again."""
        other = copy.copy(self)
        other.connection = connection
        return other

    @property
    def page_count(self) -> int:
        return max(1, -(-self.counts.total // self.filters.per_page))

    def page(self, number: int) -> list[PredictionRecord]:
        """Return the photos of a page, from 1; none after the last page."""
        return self.fetch(self._paginator.ids(limit=self.filters.per_page, offset=(number - 1) * self.filters.per_page))

    def first(self, limit: int) -> list[PredictionRecord]:
        """Return the first photos."""
        return self.fetch(self._paginator.ids(limit=limit))

    def count_facet_values(self) -> dict[int, int]:
        """Count the photos by the id of each facet value. As for other facets, a column ignores its own selected values."""
        matching = count_buckets(self.buckets, self.filters).bucket_ids
        bucket_ids = matching if len(matching) < len(self.buckets) else None
        counts: dict[int, int] = {}
        for column in (None, *self._columns):
            values = [v for v in self.facet_values if (v.column == column if column else v.column not in self._columns)]
            others = [own.photo_ids for name, own in self._columns.items() if name != column]
            if values:
                photo_ids = [*others, *self._changed]
                counts |= count_values(self.connection, values, bucket_ids=bucket_ids, photo_ids=photo_ids)
        return counts

    def ids(self) -> list[int]:
        """Return the ids of all photos in order, for ``fetch``."""
        return self._paginator.ids()

    def fetch(self, ids: Sequence[int]) -> list[PredictionRecord]:
        """Load photos by their ids, in that order. Photos that were deleted in the meantime are left out."""
        rows = self.connection.execute(select(*_COLUMNS).select_from(_JOINED).where(predictions.c.id.in_(ids)))
        records = {row.id: _record(row, self.model.classes) for row in rows}
        return [records[id_] for id_ in ids if id_ in records]

    def fetch_by_sha256(self, sha256s: Sequence[str]) -> dict[str, PredictionRecord]:
        """Load the model's photos with this content, whether they match the filter or not."""
        own = predictions.c.model_id == self.model.id
        ids = select(predictions.c.id).where(own, predictions.c.sha256.in_(sha256s)).order_by(predictions.c.id.desc())
        return {photo.sha256: photo for photo in self.fetch(list(self.connection.execute(ids).scalars()))}

    def find(self, photo: str, sha256: str = "") -> PredictionRecord:
        """Load a photo by its name, whether it matches the filter or not.

        Raises:
            RecordNotFoundError: The model has no prediction for such a photo.
        """
        is_same = predictions.c.photo.in_(unicode_forms(photo))
        named = select(predictions.c.id).where(predictions.c.model_id == self.model.id, is_same)
        if sha256:
            named = named.where(predictions.c.sha256 == sha256)
        named = named.order_by(predictions.c.photo != photo, predictions.c.id).limit(1)
        id_ = is_storable(photo, sha256) and self.connection.execute(named).scalar()
        if not id_:
            raise RecordNotFoundError(f"The model {self.model.version} has no prediction for a photo {photo!r}.")
        return self.fetch([id_])[0]

    def copies(self, photo: PredictionRecord) -> list[PredictionRecord]:
        """Fetch the model's other predictions of the same bytes."""
        same = predictions.c.model_id == self.model.id, predictions.c.sha256 == photo.sha256, predictions.c.id != photo.id
        return self.fetch(list(self.connection.execute(select(predictions.c.id).where(*same)).scalars()))

    def matches(self, photo: PredictionRecord) -> bool:
        """Return whether a photo matches the filter."""
        return self._paginator.contains(photo.id)

    def neighbors(self, photo: PredictionRecord) -> tuple[int, PredictionRecord | None, PredictionRecord | None]:
        """Locate a photo in the filter's order, whether it matches or not.

        Returns:
            The number of photos before it, the previous one and the next one.
        """
        before, previous, following = self._paginator.neighbors(self._sort_key(photo), photo.id)
        last, first = (next(iter(self.fetch(ids)), None) for ids in (previous, following))
        return before, last, first

    def _count_restricted(self) -> dict[int, int] | None:
        """Count the photos by bucket that match what buckets do not contain: columns and changes. None if there is nothing."""
        if self._columns:
            first, *others = self._columns.values()
            selects = [*(column.photo_ids for column in others), *self._changed]
            return count_by_bucket(self.connection, first, selects)
        if self._changed:
            bucket_id = predictions.c.bucket_id
            own = predictions.c.model_id == self.model.id, predictions.c.id.in_(*self._changed)
            rows = self.connection.execute(select(bucket_id, func.count()).where(*own).group_by(bucket_id))
            return {row[0]: row[1] for row in rows}
        return None

    @property
    def _paginator(self) -> Paginator:
        is_few = self._restricted_total is not None and self._restricted_total <= pagination.SMALL_RESULT
        columns = self._columns.values()
        in_columns = [predictions.c.id.in_(c.photo_ids) if is_few else c.contains_prediction for c in columns]
        return Paginator(
            self.connection,
            self.model.id,
            self.filters,
            self._bucket_counts,
            model_total=self.model_total,
            bucket_total=len(self.buckets),
            restrictions=[*in_columns, *(predictions.c.id.in_(ids) for ids in self._changed)],
            use_restrictions_first=is_few,
        )

    def _sort_key(self, photo: PredictionRecord) -> Any:
        key = getattr(photo, SORT_COLUMNS[self.filters.sort].name)
        return -1.0 if key is None else key


def get_model(connection: Connection, version: str) -> ModelRecord:
    """Load a model by its version.

    Raises:
        RecordNotFoundError: The database has no such model.
    """
    row = is_storable(version) and connection.execute(select(models).where(models.c.version == version)).first()
    if not row:
        raise RecordNotFoundError(f"There are no predictions of a model {version!r}. /gallery lists the models.")
    return ModelRecord(row.id, row.version, row.name, tuple(row.classes))


def list_models(connection: Connection) -> list[ModelRecord]:
    """Load all models, the most recently active first."""
    rows = connection.execute(select(models).order_by(models.c.last_active_at.desc(), models.c.id.desc()))
    return [ModelRecord(row.id, row.version, row.name, tuple(row.classes)) for row in rows]


def count_unreviewed_production(connection: Connection) -> dict[int, int]:
    """Count the unreviewed production photos of each model, by the model's id."""
    unreviewed = buckets.c.source == "production", buckets.c.review == "unreviewed", buckets.c.images > 0
    rows = select(buckets.c.model_id, func.sum(buckets.c.images)).where(*unreviewed).group_by(buckets.c.model_id)
    return {row[0]: int(row[1]) for row in connection.execute(rows)}


def load_buckets(connection: Connection, model: ModelRecord) -> list[Bucket]:
    """Load the non-empty buckets of a model."""
    columns = [buckets.c.id, *(buckets.c[name] for name in DIMENSIONS), buckets.c.images]
    rows = connection.execute(select(*columns).where(buckets.c.model_id == model.id, buckets.c.images > 0))
    return [Bucket.from_row(tuple(row), model.classes) for row in rows]


def _record(row: Any, classes: Sequence[str]) -> PredictionRecord:
    bucket = Bucket.from_row([row.bucket_id, *(getattr(row, name) for name in DIMENSIONS), 1], classes)
    probabilities = np.frombuffer(row.probabilities, dtype="<f4")
    is_labeled = bucket.label != UNLABELED
    decision = (row.decision_id, row.decision, row.new_label, row.note, row.reviewer, row.decided_at)
    return PredictionRecord(
        id=row.id,
        photo=row.photo,
        sha256=row.sha256,
        source=bucket.source,
        split=bucket.split,
        label=bucket.label if is_labeled else None,
        predicted=bucket.predicted,
        confidence=row.confidence,
        margin=row.margin,
        loss=row.loss if row.loss >= 0 else None,
        true_probability=float(probabilities[classes.index(bucket.label)]) if is_labeled else None,
        probabilities=probabilities,
        review=bucket.review,
        duplicate=bucket.duplicate,
        mislabeled=bucket.mislabeled,
        unlike=bucket.unlike,
        ood_score=row.ood_score,
        shuffle=row.shuffle,
        received_at=row.received_at,
        decision=DecisionRecord(*decision) if row.decision_id else None,
    )


def _match_classes(filters: Filter, model: ModelRecord) -> Filter:
    """Return the filter with its classes as the model spells them. Raises InvalidFilterError."""

    def match(name: str, value: str, *others: str) -> str:
        found = match_name((*model.classes, *others), value)
        if found is None:
            known = list_names(model.classes)
            raise InvalidFilterError(f"Invalid `{name}`: {value[:80]!r}. The classes of the model are {known}.")
        return found

    labels = tuple(match("class", value, UNLABELED) for value in filters.labels)
    return filters.replace(labels=labels, predicted=tuple(match("predicted", value) for value in filters.predicted))


_JOINED = predictions.join(buckets, predictions.c.bucket_id == buckets.c.id).outerjoin(
    current_reviews, current_reviews.c.sha256 == predictions.c.sha256
)
_COLUMNS = [
    *(predictions.c[name] for name in ("id", "bucket_id", "photo", "sha256", "loss", "confidence", "margin", "shuffle")),
    predictions.c.probabilities,
    predictions.c.received_at,
    predictions.c.ood_score,
    *(buckets.c[name] for name in DIMENSIONS),
    *(current_reviews.c[name] for name in ("decision_id", "decision", "new_label", "note", "reviewer", "decided_at")),
]

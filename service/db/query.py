"""Query the photos of a filter: counts, pages in a stable order, single photos and their neighbors."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from sqlalchemy import JSON, BigInteger, Connection, Select, Text, cast, func, literal, select

from models.errors import list_names
from service.db import pagination
from service.db.aggregates import FacetCounts, count_buckets
from service.db.errors import InvalidFilterError, InvalidReviewError, RecordNotFoundError
from service.db.facets import FacetValue, count_by_bucket, count_values, filter_by_column, list_values
from service.db.filter import COLLAPSE, UNLABELED, Filter
from service.db.ingest import DIMENSIONS
from service.db.model_comparison import select_changed
from service.db.pagination import SORT_COLUMNS, Paginator
from service.db.records import Bucket, DecisionRecord, ModelRecord, PredictionRecord
from service.db.schema import buckets, current_reviews, decisions, models, predictions
from service.db.text import is_storable, match_name, unicode_forms


class PhotoSelector(Protocol):
    """Selects photos by what the database does not store: their similarity, and their groups of near duplicates."""

    def select_sha256s(self, filters: Filter) -> list[Collection[str]]:
        """Return the sha256 of the photos of each part of a filter that is not in the database; all parts must match."""

    def duplicate_groups(self, version: str) -> Mapping[str, int]:
        """Return the group of near duplicates of each photo of a model that has one, by sha256."""


@dataclass(frozen=True)
class ViewVersion:
    """The newest decision and prediction that a page can have shown. Written as "12.345"."""

    decision: int = 0
    prediction: int = 0

    @classmethod
    def load(cls, connection: Connection) -> ViewVersion:
        """Load the version of a page that is rendered from this transaction."""
        newest = (connection.execute(select(func.max(table.c.id))).scalar() or 0 for table in (decisions, predictions))
        return cls(*newest)

    @classmethod
    def parse(cls, text: str) -> ViewVersion:
        """Parse the written form. Raises InvalidReviewError."""
        match = re.fullmatch(r"(\d{1,18})\.(\d{1,18})", text, re.ASCII)
        if match is None:
            raise InvalidReviewError(f"`view` must be the version of a listing like 12.345 (got {text[:40]!r}).")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def unbounded(cls) -> ViewVersion:
        """Return the version of a reader who has seen everything."""
        return cls(2**63 - 1, 2**63 - 1)

    def __str__(self) -> str:
        return f"{self.decision}.{self.prediction}"


class PredictionQuery:
    """The photos of one filter, on one connection."""

    def __init__(
        self,
        connection: Connection,
        filters: Filter,
        *,
        same_model_as: PredictionQuery | None = None,
        selector: PhotoSelector | None = None,
    ) -> None:
        """Count the photos that match a filter.

        Args:
            connection: A transaction.
            filters: The filter.
            same_model_as: A query of the same model, whose buckets and selector are used.
            selector: Selects photos by similarity. Without one, that part of a filter is ignored.

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
        self._selector: PhotoSelector | None = same_model_as._selector if same_model_as else selector
        self._columns = filter_by_column(self.facet_values, filters.facets)
        self._selects: list[Select[Any]] = []  # ids of photos by what neither buckets nor columns contain
        if filters.change:
            self._selects.append(select_changed(self.model, get_model(connection, filters.baseline), filters.change))
        if self._selector:
            self._selects += [self._select_sha256s(sha256s) for sha256s in self._selector.select_sha256s(filters)]
        self.buckets: Sequence[Bucket] = same_model_as.buckets if same_model_as else load_buckets(connection, self.model)
        self.model_total = sum(bucket.images for bucket in self.buckets)
        self._count()
        self.group_sizes: dict[int, int] = {}  # the near duplicates behind a photo that stands for them, by its id
        if filters.duplicates == COLLAPSE and self._selector:
            self._collapse(self._selector.duplicate_groups(self.model.version))

    def _count(self) -> None:
        """Count the photos, and those of each bucket."""
        image_counts = self._count_restricted()
        self._restricted_total = None if image_counts is None else sum(image_counts.values())
        self.counts: FacetCounts = count_buckets(self.buckets, self.filters, image_counts=image_counts)
        images = {bucket.id: bucket.images for bucket in self.buckets} if image_counts is None else image_counts
        self._bucket_counts = {id_: images[id_] for id_ in self.counts.bucket_ids}

    def _collapse(self, groups: Mapping[str, int]) -> None:
        """Leave the first photo of each group of near duplicates, in the filter's order."""
        members = self._select_sha256s(groups.keys())
        rows = self.connection.execute(select(predictions.c.id, predictions.c.sha256).where(predictions.c.id.in_(members)))
        group_of = {row.id: groups[row.sha256] for row in rows}
        first: dict[int, int] = {}
        hidden = []
        for id_ in self._paginate(members).ids():
            if first.setdefault(group_of[id_], id_) == id_:
                self.group_sizes[id_] = 1
            else:
                hidden.append(id_)
                self.group_sizes[first[group_of[id_]]] += 1
        self.group_sizes = {id_: size for id_, size in self.group_sizes.items() if size > 1}
        if hidden:
            own = predictions.c.model_id == self.model.id
            self._selects.append(select(predictions.c.id).where(own, predictions.c.id.not_in(self._list(hidden))))
            self._count()

    def _select_sha256s(self, sha256s: Collection[str]) -> Select[Any]:
        """Select the ids of the model's photos with this content."""
        own = predictions.c.model_id == self.model.id
        return select(predictions.c.id).where(own, predictions.c.sha256.in_(self._list(sha256s)))

    def _list(self, values: Collection[Any]) -> Select[Any]:
        """Select many values. They are one parameter, as the number of parameters of a statement is limited."""
        text = json.dumps(list(values))
        if self.connection.dialect.name == "sqlite":
            return select(func.json_each(text).table_valued("value").c.value)
        element = func.json_array_elements_text(cast(literal(text, Text), JSON)).column_valued("value")
        return select(cast(element, BigInteger) if isinstance(next(iter(values), ""), int) else element)

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
                photo_ids = [*others, *self._selects]
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
        """Count the photos by bucket that match what buckets do not contain. None if the filter has nothing of it."""
        if self._columns:
            first, *others = self._columns.values()
            selects = [*(column.photo_ids for column in others), *self._selects]
            return count_by_bucket(self.connection, first, selects)
        if self._selects:
            bucket_id = predictions.c.bucket_id
            own = predictions.c.model_id == self.model.id, *(predictions.c.id.in_(ids) for ids in self._selects)
            rows = self.connection.execute(select(bucket_id, func.count()).where(*own).group_by(bucket_id))
            return {row[0]: row[1] for row in rows}
        return None

    @property
    def _paginator(self) -> Paginator:
        return self._paginate()

    def _paginate(self, *more: Select[Any]) -> Paginator:
        """Return the photos in order. ``more`` select ids that all must match, too."""
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
            restrictions=[*in_columns, *(predictions.c.id.in_(ids) for ids in (*self._selects, *more))],
            use_restrictions_first=is_few,
        )

    def _sort_key(self, photo: PredictionRecord) -> Any:
        key = photo.ood_score if self.filters.sort == "outlier" else getattr(photo, SORT_COLUMNS[self.filters.sort].name)
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

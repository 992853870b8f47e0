"""A grid's photos, page by page, in an order that is stable; and a photo's place in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, func, select

from service.db.aggregates import Bucket, FacetCounts, bucket_from_row, count_buckets
from service.db.filter import UNLABELED, Filter
from service.db.ingest import DIMENSIONS
from service.db.model_comparison import select_changed
from service.db.pagination import Paginator
from service.db.schema import buckets, current_reviews, models, predictions
from service.http.errors import Problem
from service.http.text_validation import is_storable


@dataclass(frozen=True)
class ModelRecord:
    """A model that the database has predictions of."""

    id: int
    version: str
    name: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class DecisionRecord:
    """What holds of a photo: the decision ``label`` with its ``new_label``, ``neither`` or ``bad``."""

    id: int
    decision: str
    new_label: str | None
    note: str
    reviewer: str
    decided_at: datetime


@dataclass(frozen=True, eq=False)
class PredictionRecord:
    """What a model said of one photo, and what was decided. ``probabilities`` is (C,) in the order of the model's classes."""

    id: int
    photo: str
    sha256: str
    source: str
    split: str
    label: str | None
    predicted: str
    confidence: float
    margin: float
    loss: float | None
    true_probability: float | None
    probabilities: NDArray[np.float32]
    review: str
    duplicate: bool
    mislabeled: bool
    shuffle: int
    decision: DecisionRecord | None

    @property
    def outcome(self) -> str:
        return "unlabeled" if self.label is None else "correct" if self.label == self.predicted else "incorrect"


class PredictionQuery:
    """One filter on one connection: its counts, its pages, its photos one after the other."""

    def __init__(self, connection: Connection, filters: Filter, *, same_model_as: PredictionQuery | None = None) -> None:
        """What is known of the model is not read again where ``same_model_as`` is another filter of the same model.

        Raises Problem for a model or a class that is not known.
        """
        self.connection = connection
        self.filters = filters
        self.model: ModelRecord = same_model_as.model if same_model_as else get_model(connection, filters.model)
        _check_classes(filters, self.model)
        self._changed = None
        image_counts: dict[int, int] | None = None
        if filters.change:
            self._changed = select_changed(self.model, get_model(connection, filters.baseline), filters.change)
            of_cell = predictions.c.bucket_id
            found = select(of_cell, func.count()).where(predictions.c.id.in_(self._changed)).group_by(of_cell)
            image_counts = {row[0]: row[1] for row in connection.execute(found)}
        self.buckets: Sequence[Bucket] = same_model_as.buckets if same_model_as else load_buckets(connection, self.model)
        self.model_total = sum(bucket.images for bucket in self.buckets)
        self.counts: FacetCounts = count_buckets(self.buckets, filters, image_counts=image_counts)
        images = image_counts or {bucket.id: bucket.images for bucket in self.buckets}
        self._photos_in = {id_: images[id_] for id_ in self.counts.bucket_ids}

    def with_connection(self, connection: Connection) -> PredictionQuery:
        """The same listing on another connection, counted as it was."""
        other = copy.copy(self)
        other.connection = connection
        return other

    @property
    def page_count(self) -> int:
        return max(1, -(-self.counts.total // self.filters.per_page))

    def page(self, number: int) -> list[PredictionRecord]:
        """The photos of one page, from 1; empty behind the last."""
        return self.fetch(self._order.ids(limit=self.filters.per_page, offset=(number - 1) * self.filters.per_page))

    def first(self, limit: int) -> list[PredictionRecord]:
        return self.fetch(self._order.ids(limit=limit))

    def ids(self) -> list[int]:
        """Every photo's id, in the filter's order: what ``photos`` takes."""
        return self._order.ids()

    def fetch_by_sha256(self, sha256s: Sequence[str]) -> dict[str, PredictionRecord]:
        """The model's photos of these contents, whether the filter lets them through or not."""
        mine = predictions.c.model_id == self.model.id
        found = select(predictions.c.id).where(mine, predictions.c.sha256.in_(sha256s)).order_by(predictions.c.id.desc())
        return {photo.sha256: photo for photo in self.fetch(list(self.connection.execute(found).scalars()))}

    def copies(self, photo: PredictionRecord) -> list[PredictionRecord]:
        """Fetch the model's other predictions of the same bytes."""
        same = predictions.c.model_id == self.model.id, predictions.c.sha256 == photo.sha256, predictions.c.id != photo.id
        return self.fetch(list(self.connection.execute(select(predictions.c.id).where(*same)).scalars()))

    def fetch(self, ids: Sequence[int]) -> list[PredictionRecord]:
        """The photos with these ids, in their order; one that is gone meanwhile is passed over."""
        found = select(*_COLUMNS).select_from(_JOINED).where(predictions.c.id.in_(ids))
        rows = {row.id: self._photo(row) for row in self.connection.execute(found)}
        return [rows[id_] for id_ in ids if id_ in rows]

    def find(self, photo: str, sha256: str = "") -> PredictionRecord:
        """The photo of that name, whether the filter lets it through or not; raises Problem where there is none."""
        named = select(predictions.c.id).where(predictions.c.model_id == self.model.id, predictions.c.photo == photo)
        if sha256:
            named = named.where(predictions.c.sha256 == sha256)
        named = named.order_by(predictions.c.id).limit(1)
        found = is_storable(photo, sha256) and self.connection.execute(named).scalar()
        if not found:
            raise Problem("not_found", f"The model {self.model.version} was not evaluated on a photo {photo!r}.")
        return self.fetch([found])[0]

    def matches(self, photo: PredictionRecord) -> bool:
        """Whether the photo is one of the filter's."""
        return self._order.contains(photo.id)

    def neighbors(self, photo: PredictionRecord) -> tuple[int, PredictionRecord | None, PredictionRecord | None]:
        """How many photos of the filter come before this one, the last of them, and the first that comes after it."""
        before, previous, following = self._order.neighbors(self._key(photo), photo.id)
        last, first = (next(iter(self.fetch(ids)), None) for ids in (previous, following))
        return before, last, first

    @property
    def _order(self) -> Paginator:
        return Paginator(
            self.connection,
            self.model.id,
            self.filters,
            self._photos_in,
            model_total=self.model_total,
            bucket_total=len(self.buckets),
            restrict_to=self._changed,
        )

    def _key(self, photo: PredictionRecord) -> Any:
        key = {"loss": photo.loss, "confidence": photo.confidence, "margin": photo.margin, "name": photo.photo}
        found = key.get(self.filters.sort, photo.shuffle)
        return -1.0 if found is None else found

    def _photo(self, row: Any) -> PredictionRecord:
        cell = bucket_from_row([row.bucket_id, *(getattr(row, name) for name in DIMENSIONS), 1], self.model.classes)
        values = np.frombuffer(row.probabilities, dtype="<f4")
        known = cell.label != UNLABELED
        decided = (
            DecisionRecord(row.decision_id, row.decision, row.new_label, row.note, row.reviewer, row.decided_at)
            if row.decision_id
            else None
        )
        return PredictionRecord(
            id=row.id,
            photo=row.photo,
            sha256=row.sha256,
            source=cell.source,
            split=cell.split,
            label=cell.label if known else None,
            predicted=cell.predicted,
            confidence=row.confidence,
            margin=row.margin,
            loss=row.loss if row.loss >= 0 else None,
            true_probability=float(values[self.model.classes.index(cell.label)]) if known else None,
            probabilities=values,
            review=cell.review,
            duplicate=cell.duplicate,
            mislabeled=cell.mislabeled,
            shuffle=row.shuffle,
            decision=decided,
        )


def get_model(connection: Connection, version: str) -> ModelRecord:
    """The model of that version; raises Problem where none is known."""
    row = is_storable(version) and connection.execute(select(models).where(models.c.version == version)).first()
    if not row:
        raise Problem(
            "not_found", f"There are no predictions of a model {version!r} here; /gallery lists those that there are."
        )
    return ModelRecord(row.id, row.version, row.name, tuple(row.classes))


def list_models(connection: Connection) -> list[ModelRecord]:
    """All of them, the one seen last first."""
    rows = connection.execute(select(models).order_by(models.c.last_active_at.desc(), models.c.id.desc()))
    return [ModelRecord(row.id, row.version, row.name, tuple(row.classes)) for row in rows]


def load_buckets(connection: Connection, model: ModelRecord) -> list[Bucket]:
    columns = [buckets.c.id, *(buckets.c[name] for name in DIMENSIONS), buckets.c.images]
    found = select(*columns).where(buckets.c.model_id == model.id, buckets.c.images > 0)
    return [bucket_from_row(tuple(row), model.classes) for row in connection.execute(found)]


def _check_classes(filters: Filter, model: ModelRecord) -> None:
    for name, values in (("class", filters.labels), ("predicted", filters.predicted)):
        for value in values:
            if value not in model.classes and not (name == "class" and value == UNLABELED):
                some = ", ".join(model.classes[:20]) + (" and others" if len(model.classes) > 20 else "")
                raise Problem("bad_parameter", f"The parameter `{name}` is {value!r}; the model knows {some}.")


_JOINED = predictions.join(buckets, predictions.c.bucket_id == buckets.c.id).outerjoin(
    current_reviews, current_reviews.c.sha256 == predictions.c.sha256
)
_COLUMNS = [
    *(predictions.c[name] for name in ("id", "bucket_id", "photo", "sha256", "loss", "confidence", "margin", "shuffle")),
    predictions.c.probabilities,
    *(buckets.c[name] for name in DIMENSIONS),
    *(current_reviews.c[name] for name in ("decision_id", "decision", "new_label", "note", "reviewer", "decided_at")),
]

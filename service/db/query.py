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

from service.db.aggregates import Cell, Counts, count, name_cell
from service.db.filter import UNLABELLED, Filter
from service.db.ingest import DIMENSIONS
from service.db.model_comparison import changed
from service.db.pagination import Order
from service.db.schema import can_be_kept, cells, current_reviews, models, predictions
from service.http.errors import Problem


@dataclass(frozen=True)
class KnownModel:
    """A model that the database has predictions of."""

    id: int
    version: str
    name: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """What holds of a photo: the decision ``label`` with its ``new_label``, ``neither`` or ``bad``."""

    id: int
    decision: str
    new_label: str | None
    note: str
    reviewer: str
    decided_at: datetime


@dataclass(frozen=True, eq=False)
class Photo:
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
    p_true: float | None
    probabilities: NDArray[np.float32]
    review: str
    duplicate: bool
    mislabelled: bool
    shuffle: int
    decision: Decision | None

    @property
    def verdict(self) -> str:
        return "unknown" if self.label is None else "right" if self.label == self.predicted else "wrong"


class Listing:
    """One filter on one connection: its counts, its pages, its photos one after the other."""

    def __init__(self, connection: Connection, wanted: Filter, *, beside: Listing | None = None) -> None:
        """What is known of the model is not read again where ``beside`` is another filter of the same model.

        Raises Problem for a model or a class that is not known.
        """
        self.connection = connection
        self.wanted = wanted
        self.model: KnownModel = beside.model if beside else find_model(connection, wanted.model)
        _check_classes(wanted, self.model)
        self._changed = None
        among: dict[int, int] | None = None
        if wanted.change:
            self._changed = changed(self.model, find_model(connection, wanted.vs), wanted.change)
            of_cell = predictions.c.cell_id
            found = select(of_cell, func.count()).where(predictions.c.id.in_(self._changed)).group_by(of_cell)
            among = {row[0]: row[1] for row in connection.execute(found)}
        self.cells: Sequence[Cell] = beside.cells if beside else cells_of(connection, self.model)
        self.everything = sum(cell.images for cell in self.cells)
        self.counts: Counts = count(self.cells, wanted, among=among)
        photos = among or {cell.id: cell.images for cell in self.cells}
        self._photos_in = {id_: photos[id_] for id_ in self.counts.cells}

    def on(self, connection: Connection) -> Listing:
        """The same listing on another connection, counted as it was."""
        other = copy.copy(self)
        other.connection = connection
        return other

    @property
    def pages(self) -> int:
        return max(1, -(-self.counts.total // self.wanted.per_page))

    def page(self, number: int) -> list[Photo]:
        """The photos of one page, from 1; empty behind the last."""
        return self.photos(self._order.ids(limit=self.wanted.per_page, offset=(number - 1) * self.wanted.per_page))

    def first(self, limit: int) -> list[Photo]:
        return self.photos(self._order.ids(limit=limit))

    def ids(self) -> list[int]:
        """Every photo's id, in the filter's order: what ``photos`` takes."""
        return self._order.ids()

    def with_sha256(self, sha256s: Sequence[str]) -> dict[str, Photo]:
        """The model's photos of these contents, whether the filter lets them through or not."""
        mine = predictions.c.model_id == self.model.id
        found = select(predictions.c.id).where(mine, predictions.c.sha256.in_(sha256s)).order_by(predictions.c.id.desc())
        return {photo.sha256: photo for photo in self.photos(list(self.connection.execute(found).scalars()))}

    def photos(self, ids: Sequence[int]) -> list[Photo]:
        """The photos with these ids, in their order; one that is gone meanwhile is passed over."""
        found = select(*_COLUMNS).select_from(_JOINED).where(predictions.c.id.in_(ids))
        rows = {row.id: self._photo(row) for row in self.connection.execute(found)}
        return [rows[id_] for id_ in ids if id_ in rows]

    def find(self, photo: str, sha256: str = "") -> Photo:
        """The photo of that name, whether the filter lets it through or not; raises Problem where there is none."""
        named = select(predictions.c.id).where(predictions.c.model_id == self.model.id, predictions.c.photo == photo)
        if sha256:
            named = named.where(predictions.c.sha256 == sha256)
        named = named.order_by(predictions.c.id).limit(1)
        found = can_be_kept(photo, sha256) and self.connection.execute(named).scalar()
        if not found:
            raise Problem("not_found", f"The model {self.model.version} was not evaluated on a photo {photo!r}.")
        return self.photos([found])[0]

    def lets_through(self, photo: Photo) -> bool:
        """Whether the photo is one of the filter's."""
        return self._order.has(photo.id)

    def around(self, photo: Photo) -> tuple[int, Photo | None, Photo | None]:
        """How many photos of the filter come before this one, the last of them, and the first that comes after it."""
        before, previous, following = self._order.around(self._key(photo), photo.id)
        last, first = (next(iter(self.photos(ids)), None) for ids in (previous, following))
        return before, last, first

    @property
    def _order(self) -> Order:
        return Order(
            self.connection,
            self.model.id,
            self.wanted,
            self._photos_in,
            everything=self.everything,
            all_cells=len(self.cells),
            among=self._changed,
        )

    def _key(self, photo: Photo) -> Any:
        key = {"loss": photo.loss, "confidence": photo.confidence, "margin": photo.margin, "name": photo.photo}
        found = key.get(self.wanted.sort, photo.shuffle)
        return -1.0 if found is None else found

    def _photo(self, row: Any) -> Photo:
        cell = name_cell([row.cell_id, *(getattr(row, name) for name in DIMENSIONS), 1], self.model.classes)
        values = np.frombuffer(row.probabilities, dtype="<f4")
        known = cell.label != UNLABELLED
        decided = (
            Decision(row.decision_id, row.decision, row.new_label, row.note, row.reviewer, row.decided_at)
            if row.decision_id
            else None
        )
        return Photo(
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
            p_true=float(values[self.model.classes.index(cell.label)]) if known else None,
            probabilities=values,
            review=cell.review,
            duplicate=cell.duplicate,
            mislabelled=cell.mislabelled,
            shuffle=row.shuffle,
            decision=decided,
        )


def find_model(connection: Connection, version: str) -> KnownModel:
    """The model of that version; raises Problem where none is known."""
    row = can_be_kept(version) and connection.execute(select(models).where(models.c.version == version)).first()
    if not row:
        raise Problem(
            "not_found", f"There are no predictions of a model {version!r} here; /gallery lists those that there are."
        )
    return KnownModel(row.id, row.version, row.name, tuple(row.classes))


def known_models(connection: Connection) -> list[KnownModel]:
    """All of them, the one seen last first."""
    rows = connection.execute(select(models).order_by(models.c.seen_at.desc(), models.c.id.desc()))
    return [KnownModel(row.id, row.version, row.name, tuple(row.classes)) for row in rows]


def cells_of(connection: Connection, model: KnownModel) -> list[Cell]:
    columns = [cells.c.id, *(cells.c[name] for name in DIMENSIONS), cells.c.photos]
    found = select(*columns).where(cells.c.model_id == model.id, cells.c.photos > 0)
    return [name_cell(tuple(row), model.classes) for row in connection.execute(found)]


def _check_classes(wanted: Filter, model: KnownModel) -> None:
    for name, values in (("class", wanted.labels), ("predicted", wanted.predicted)):
        for value in values:
            if value not in model.classes and not (name == "class" and value == UNLABELLED):
                some = ", ".join(model.classes[:20]) + (" and others" if len(model.classes) > 20 else "")
                raise Problem("bad_parameter", f"The parameter `{name}` is {value!r}; the model knows {some}.")


_JOINED = predictions.join(cells, predictions.c.cell_id == cells.c.id).outerjoin(
    current_reviews, current_reviews.c.sha256 == predictions.c.sha256
)
_COLUMNS = [
    *(predictions.c[name] for name in ("id", "cell_id", "photo", "sha256", "loss", "confidence", "margin", "shuffle")),
    predictions.c.probabilities,
    *(cells.c[name] for name in DIMENSIONS),
    *(current_reviews.c[name] for name in ("decision_id", "decision", "new_label", "note", "reviewer", "decided_at")),
]

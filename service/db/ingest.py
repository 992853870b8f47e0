"""What a model said of many photos comes into the database: once, whole or not at all."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, case, insert, select, update

from models.artifacts.predictions import Predictions, cross_entropy
from service.db.schema import RANGE_COLUMNS, UNKNOWN, buckets, current_reviews, imports, models, predictions

CHUNK_ROWS = 5_000
DIMENSIONS = ("source", "split", "label", "predicted", "percent", "review", "duplicate", "mislabeled")
_PERCENTS = [n / 100 for n in range(100)]  # confidence * 100 rounds: 0.29 * 100 is less than 29
BucketKey = tuple[Any, ...]  # a value for each of DIMENSIONS


@dataclass(frozen=True)
class EvaluationTable:
    """The predictions of one evaluation, and what else is known of its N photos: ``duplicate`` and ``mislabeled`` are (N,)."""

    source: str
    digest: str
    predictions: Predictions
    duplicate: NDArray[np.bool_]
    mislabeled: NDArray[np.bool_]


@dataclass
class BucketTotals:
    """Rows of predictions that come into cells: how many for each cell's id, and between which values of RANGED."""

    counts: Counter[int] = field(default_factory=Counter)
    lows: dict[int, list[Any]] = field(default_factory=dict)
    highs: dict[int, list[Any]] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        id_, values = row["bucket_id"], _ranged(row)
        self.counts[id_] += 1
        self.lows[id_] = list(map(min, self.lows.get(id_, values), values))
        self.highs[id_] = list(map(max, self.highs.get(id_, values), values))


_ranged = itemgetter(*RANGE_COLUMNS)


# What has to be known of a prediction to move it from one cell to another.
PREDICTION_COLUMNS = (
    predictions.c.id.label("prediction_id"),
    predictions.c.bucket_id,
    *(predictions.c[name] for name in RANGE_COLUMNS),
    *(buckets.c[name] for name in DIMENSIONS),
)


@dataclass
class BucketWriter:
    """The cells of one model, found or made as they are needed."""

    connection: Connection
    model_id: int
    ids: dict[BucketKey, int] = field(default_factory=dict)

    def get_or_create(self, place: BucketKey) -> int:
        """The id of the cell with these values."""
        if place not in self.ids:
            row = dict(zip(DIMENSIONS, place, strict=True)) | {"model_id": self.model_id}
            found = select(buckets.c.id).where(*(buckets.c[name] == value for name, value in row.items()))
            id_ = self.connection.execute(found).scalar()
            if id_ is None:
                made = self.connection.execute(insert(buckets).values(images=0, **row))
                id_ = made.inserted_primary_key[0]  # type: ignore[index]
            self.ids[place] = id_
        return self.ids[place]

    def add(self, tally: BucketTotals) -> None:
        """Count photos into their cells, which from now on reach as far as these do."""
        for id_, number in sorted(tally.counts.items()):
            values: dict[str, Any] = {"images": buckets.c.images + number}
            for name, low, high in zip(RANGE_COLUMNS, tally.lows[id_], tally.highs[id_], strict=True):
                first, last = buckets.c[f"{name}_low"], buckets.c[f"{name}_high"]
                values[first.name] = case((first < low, first), else_=low)  # nothing is less or more than null
                values[last.name] = case((last > high, last), else_=high)
            self.connection.execute(update(buckets).where(buckets.c.id == id_).values(values))

    def move(self, row: Mapping[Any, Any], **changes: Any) -> None:
        """Put a prediction, a row of PLACED, into the cell where it has these ``changes``; its loss may be one of them."""
        now = {**row, **changes}
        to = self.get_or_create(tuple(now[name] for name in DIMENSIONS))
        if to == row["bucket_id"]:
            return
        moved = update(predictions).where(predictions.c.id == row["prediction_id"])
        self.connection.execute(moved.values(bucket_id=to, loss=now["loss"]))
        self.remove(row["bucket_id"])
        tally = BucketTotals()
        tally.add({**now, "bucket_id": to})
        self.add(tally)

    def remove(self, id_: int, photos: int = 1) -> None:
        """Count photos out of a cell, which keeps its reach."""
        self.connection.execute(update(buckets).where(buckets.c.id == id_).values(images=buckets.c.images - photos))


def get_or_create_model(connection: Connection, *, version: str, name: str, classes: Sequence[str]) -> int:
    """The id of a model, which is entered where it is new."""
    known = connection.execute(select(models.c.id).where(models.c.version == version)).scalar()
    if known is not None:
        return int(known)
    row = {"version": version, "name": name, "classes": list(classes), "last_active_at": datetime.now(timezone.utc)}
    return int(connection.execute(insert(models).values(row)).inserted_primary_key[0])  # type: ignore[index]


def mark_model_active(connection: Connection, model_id: int) -> None:
    """Note that a model was put to serve now."""
    connection.execute(update(models).where(models.c.id == model_id).values(last_active_at=datetime.now(timezone.utc)))


def is_imported(connection: Connection, version: str, digest: str) -> bool:
    found = select(imports.c.id).join(models).where(models.c.version == version, imports.c.digest == digest)
    return connection.execute(found).first() is not None


def import_predictions(connection: Connection, model_id: int, table: EvaluationTable) -> int:
    """Enter the predictions that the model does not have yet, under the decisions that there are; returns their number.

    Of those that it has, what looks mislabelled now is called so.
    """
    said = table.predictions
    known = {tuple(row): id_ for id_, *row in connection.execute(_photos_of(model_id))}
    new, suspected = [], []
    for i, photo in enumerate(zip(map(encode_file_name, said.image_names), said.sha256s, strict=True)):
        if photo not in known:
            known[photo] = 0
            new.append(i)
        elif known[photo] and table.mislabeled[i]:
            suspected.append(known[photo])
    reviews = _decisions_on(connection)
    places = BucketWriter(connection, model_id)
    tally = BucketTotals()
    for rows in _in_chunks(_rows(table, new, reviews, model_id, places)):
        connection.execute(insert(predictions), rows)
        for row in rows:
            tally.add(row)
    places.add(tally)
    for id_ in suspected:  # an earlier import brought them
        known_row = connection.execute(select(*PREDICTION_COLUMNS).join(buckets).where(predictions.c.id == id_)).one()
        places.move(known_row._mapping, mislabeled=True)
    connection.execute(
        insert(imports).values(
            model_id=model_id,
            digest=table.digest,
            source=table.source,
            images=len(new),
            imported_at=datetime.now(timezone.utc),
        )
    )
    return len(new)


def resolve_label(
    review: Row[Any] | None, *, label: int, predicted: int, classes: Sequence[str], source: str
) -> tuple[int, str]:
    """The label and the state of a photo under the decision that holds for it, or under none.

    An evaluated photo keeps the label that it was evaluated with. A live one has the label that it was given, if any.
    """
    if review is None:
        return (UNKNOWN if source == "production" else label), "unreviewed"
    if review.decision != "label":
        return (UNKNOWN if source == "production" else label), str(review.decision)
    given = classes.index(review.new_label) if review.new_label in classes else UNKNOWN
    before = predicted if source == "production" else label
    return (given if source == "production" else label), "confirmed" if given == before else "relabeled"


def _rows(
    table: EvaluationTable, which: Sequence[int], reviews: Mapping[str, Any], model_id: int, places: BucketWriter
) -> Iterator[dict[str, Any]]:
    said = table.predictions
    predicted, confidence, losses = said.predicted, said.confidence, said.losses
    values = said.probabilities.astype("<f4")
    margins = compute_margins(said.probabilities)
    for i in which:
        sha256 = said.sha256s[i]
        guess = int(predicted[i])
        label, review = resolve_label(
            reviews.get(sha256), label=int(said.labels[i]), predicted=guess, classes=said.classes, source=table.source
        )
        flags = bool(table.duplicate[i]), bool(table.mislabeled[i])
        place = (
            table.source,
            encode_file_name(said.splits[i]),
            label,
            guess,
            confidence_percent(float(confidence[i])),
            review,
            *flags,
        )
        yield {
            "model_id": model_id,
            "bucket_id": places.get_or_create(place),
            "photo": encode_file_name(said.image_names[i]),
            "sha256": sha256,
            "loss": float(losses[i]),
            "confidence": float(confidence[i]),
            "margin": float(margins[i]),
            "shuffle": shuffle_key(sha256),
            "probabilities": values[i].tobytes(),
        }


def production_loss(probabilities: bytes, label: int) -> float:
    """The loss of a live photo as it is stored: UNKNOWN as long as it has no label."""
    if label == UNKNOWN:
        return float(UNKNOWN)
    values = np.frombuffer(probabilities, dtype="<f4").astype(np.float64)
    return float(cross_entropy(np.array([label]), values[None])[0])


def confidence_percent(confidence: float) -> int:
    """The whole per cent of a confidence, the highest n with n / 100 <= confidence; 100 % counts as 99."""
    return bisect.bisect_right(_PERCENTS, confidence) - 1


def compute_margins(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """(N, C) -> (N,) how far the highest probability is above the second; all of it where there is one class."""
    if probabilities.shape[1] < 2:
        return probabilities[:, 0].astype(np.float64)
    highest = np.sort(probabilities, axis=1)[:, -2:]
    return np.asarray(highest[:, 1] - highest[:, 0], dtype=np.float64)


def shuffle_key(sha256: str) -> int:
    """31 bits that have nothing to do with anything else of the photo."""
    return int(sha256[:8], 16) >> 1


def encode_file_name(photo: str) -> str:
    """With what no database takes, as bytes of a file's name that are no UTF-8, as characters of private use."""
    return photo.translate(_TO_PRIVATE)


def decode_file_name(photo: str) -> str:
    """The name as the file system and predictions.csv have it."""
    return photo.translate(_FROM_PRIVATE)


_TO_PRIVATE = {0: 0xF700} | {0xDC00 + byte: 0xF700 + byte for byte in range(128, 256)}
_FROM_PRIVATE = {private: escaped for escaped, private in _TO_PRIVATE.items()}


def _photos_of(model_id: int) -> Any:
    return select(predictions.c.id, predictions.c.photo, predictions.c.sha256).where(predictions.c.model_id == model_id)


def _decisions_on(connection: Connection) -> dict[str, Any]:
    columns = current_reviews.c
    found = select(columns.sha256, columns.decision, columns.new_label)
    return {row.sha256: row for row in connection.execute(found).all()}


def _in_chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

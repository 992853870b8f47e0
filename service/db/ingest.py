"""Import the predictions of an evaluation completely or not at all, and maintain the buckets that count them."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, bindparam, case, insert, select, update

from models.artifacts.predictions import Predictions, cross_entropy
from service.db.facets import import_columns
from service.db.schema import RANGE_COLUMNS, UNKNOWN, buckets, current_reviews, imports, models, photo_facets, predictions
from service.db.text import encode_file_name

CHUNK_ROWS = 5_000
MANY_BUCKETS = 20  # from this number on, all buckets of a model are read at once
DIMENSIONS = ("source", "split", "label", "predicted", "percent", "review", "duplicate", "mislabeled", "unlike")
_PERCENTS = [n / 100 for n in range(100)]  # confidence * 100 rounds: 0.29 * 100 is less than 29
BucketKey = tuple[Any, ...]  # a value for each of DIMENSIONS
_range_values = itemgetter(*RANGE_COLUMNS)
_bucket_key = itemgetter(*DIMENSIONS)

# The columns that BucketWriter.move needs.
PREDICTION_COLUMNS = (
    predictions.c.id.label("prediction_id"),
    predictions.c.bucket_id,
    *(predictions.c[name] for name in RANGE_COLUMNS),
    *(buckets.c[name] for name in DIMENSIONS),
)


@dataclass(frozen=True)
class EvaluationTable:
    """The predictions of one evaluation of N photos; ``duplicate``, ``mislabeled`` and ``unlike`` are (N,) masks."""

    source: str
    digest: str
    predictions: Predictions
    duplicate: NDArray[np.bool_]
    mislabeled: NDArray[np.bool_]
    unlike: NDArray[np.bool_]


@dataclass
class BucketTotals:
    """Predictions to be added to buckets: their number by bucket id, and the lowest and highest of RANGE_COLUMNS."""

    counts: Counter[int] = field(default_factory=Counter)
    lows: dict[int, list[Any]] = field(default_factory=dict)
    highs: dict[int, list[Any]] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of predictions."""
        id_, values = row["bucket_id"], _range_values(row)
        self.counts[id_] += 1
        self.lows[id_] = list(map(min, self.lows.get(id_, values), values))
        self.highs[id_] = list(map(max, self.highs.get(id_, values), values))


@dataclass
class BucketWriter:
    """The buckets of one model, created as they are needed."""

    connection: Connection
    model_id: int
    ids: dict[BucketKey, int] = field(default_factory=dict)

    def get_or_create(self, key: BucketKey) -> int:
        """Return the id of the bucket with these values."""
        if key not in self.ids:
            row = dict(zip(DIMENSIONS, key, strict=True)) | {"model_id": self.model_id}
            existing = select(buckets.c.id).where(*(buckets.c[name] == value for name, value in row.items()))
            id_ = self.connection.execute(existing).scalar()
            if id_ is None:
                created = self.connection.execute(insert(buckets).values(images=0, **row))
                id_ = created.inserted_primary_key[0]  # type: ignore[index]
            self.ids[key] = id_
        return self.ids[key]

    def prepare(self, keys: Collection[BucketKey]) -> None:
        """Look up or create many buckets at once, for ``get_or_create``."""
        if len(keys) < MANY_BUCKETS:
            return
        own = select(buckets.c.id, *(buckets.c[name] for name in DIMENSIONS)).where(buckets.c.model_id == self.model_id)
        self.ids |= {tuple(key): id_ for id_, *key in self.connection.execute(own)}
        if new := [key for key in keys if key not in self.ids]:
            rows = [dict(zip(DIMENSIONS, key, strict=True)) | {"model_id": self.model_id, "images": 0} for key in new]
            self.connection.execute(insert(buckets), rows)
            self.ids |= {tuple(key): id_ for id_, *key in self.connection.execute(own)}

    def add(self, totals: BucketTotals) -> None:
        """Add predictions to the counts and ranges of their buckets."""
        rows = [
            {"own_id": id_, "number": number}
            | {f"{name}_from": low for name, low in zip(RANGE_COLUMNS, totals.lows[id_], strict=True)}
            | {f"{name}_to": high for name, high in zip(RANGE_COLUMNS, totals.highs[id_], strict=True)}
            for id_, number in sorted(totals.counts.items())
        ]
        if not rows:
            return
        values: dict[str, Any] = {"images": buckets.c.images + bindparam("number")}
        for name in RANGE_COLUMNS:
            first, last = buckets.c[f"{name}_low"], buckets.c[f"{name}_high"]
            low, high = bindparam(f"{name}_from", type_=first.type), bindparam(f"{name}_to", type_=last.type)
            values[first.name] = case((first < low, first), else_=low)  # a comparison with null is not true
            values[last.name] = case((last > high, last), else_=high)
        self.connection.execute(update(buckets).where(buckets.c.id == bindparam("own_id")).values(values), rows)

    def move(self, changed: Iterable[tuple[Mapping[Any, Any], Mapping[str, Any]]]) -> None:
        """Move predictions to other buckets.

        Args:
            changed: Each prediction (a row of PREDICTION_COLUMNS) with its new values, which may include its loss.
        """
        moved, removed, totals = [], Counter[int](), BucketTotals()
        merged = [(row, {**row, **changes}) for row, changes in changed]
        self.prepare({_bucket_key(new) for _, new in merged})
        for row, new in merged:
            to = self.get_or_create(_bucket_key(new))
            if to != row["bucket_id"]:
                moved.append({"moved_id": row["prediction_id"], "to": to, "new_loss": new["loss"]})
                removed[row["bucket_id"]] += 1
                totals.add({**new, "bucket_id": to})
        if not moved:
            return
        each = update(predictions).where(predictions.c.id == bindparam("moved_id"))
        self.connection.execute(each.values(bucket_id=bindparam("to"), loss=bindparam("new_loss")), moved)
        links = update(photo_facets).where(photo_facets.c.prediction_id == bindparam("moved_id"))
        self.connection.execute(
            links.values(bucket_id=bindparam("to")), [{"moved_id": row["moved_id"], "to": row["to"]} for row in moved]
        )
        less = update(buckets).where(buckets.c.id == bindparam("own_id")).values(images=buckets.c.images - bindparam("number"))
        self.connection.execute(less, [{"own_id": id_, "number": number} for id_, number in sorted(removed.items())])
        self.add(totals)


def remove_from_bucket(connection: Connection, id_: int, images: int = 1) -> None:
    """Subtract photos from a bucket, which keeps its ranges."""
    connection.execute(update(buckets).where(buckets.c.id == id_).values(images=buckets.c.images - images))


def get_or_create_model(connection: Connection, *, version: str, name: str, classes: Sequence[str]) -> int:
    """Return the id of a model, which is inserted if it is new."""
    known = connection.execute(select(models.c.id).where(models.c.version == version)).scalar()
    if known is not None:
        return int(known)
    row = {"version": version, "name": name, "classes": list(classes), "last_active_at": datetime.now(timezone.utc)}
    return int(connection.execute(insert(models).values(row)).inserted_primary_key[0])  # type: ignore[index]


def mark_model_active(connection: Connection, model_id: int) -> None:
    """Record that a model went live now."""
    connection.execute(update(models).where(models.c.id == model_id).values(last_active_at=datetime.now(timezone.utc)))


def is_imported(connection: Connection, version: str, digest: str) -> bool:
    """Return whether an evaluation of a model is in the database."""
    imported = select(imports.c.id).join(models).where(models.c.version == version, imports.c.digest == digest)
    return connection.execute(imported).first() is not None


def import_predictions(connection: Connection, model_id: int, table: EvaluationTable) -> int:
    """Insert the predictions that the model does not have yet, with the current reviews applied.

    A photo that the model has already is flagged if the table flags it as mislabeled.

    Returns:
        The number of inserted predictions.
    """
    source = table.predictions
    known = {photo: id_ for photo, (id_, _) in _load_photos(connection, model_id).items()}
    new, flagged = [], []
    for i, photo in enumerate(zip(map(encode_file_name, source.image_names), source.sha256s, strict=True)):
        if photo not in known:
            known[photo] = 0
            new.append(i)
        elif known[photo] and table.mislabeled[i]:
            flagged.append(known[photo])
    writer = BucketWriter(connection, model_id)
    totals = BucketTotals()
    new_rows = _rows(table, new, _load_reviews(connection), writer)
    while rows := list(islice(new_rows, CHUNK_ROWS)):
        connection.execute(insert(predictions), rows)
        for row in rows:
            totals.add(row)
    writer.add(totals)
    if source.facets or any(source.groups) or any(source.odd_files):
        import_columns(connection, model_id, source, _load_photos(connection, model_id), new)
    for start in range(0, len(flagged), CHUNK_ROWS):
        chunk = predictions.c.id.in_(flagged[start : start + CHUNK_ROWS])
        known_rows = connection.execute(select(*PREDICTION_COLUMNS).join(buckets).where(chunk)).all()
        writer.move((row._mapping, {"mislabeled": True}) for row in known_rows)
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
    """Apply the current review of a photo.

    Args:
        review: The row of current_reviews, or None.
        label: The class index that the photo was evaluated with.
        predicted: The predicted class index.
        classes: The classes of the model.
        source: The source of the prediction. An evaluated photo keeps its label; a production photo has the reviewed one.

    Returns:
        The label, or UNKNOWN, and the review state.
    """
    is_production = source == "production"
    original = UNKNOWN if is_production else label
    if review is None:
        return original, "unreviewed"
    if review.decision != "label":
        return original, str(review.decision)
    reviewed = classes.index(review.new_label) if review.new_label in classes else UNKNOWN
    state = "confirmed" if reviewed == (predicted if is_production else label) else "relabeled"
    return (reviewed if is_production else label), state


def prediction_row(
    bucket_id: int, photo: str, sha256: str, probabilities: NDArray[Any], *, loss: float, ood_score: float | None
) -> dict[str, Any]:
    """Return the columns of ``predictions`` for one photo, apart from the model. ``probabilities`` is (C,)."""
    *rest, highest = np.sort(probabilities)[-2:]
    return {
        "bucket_id": bucket_id,
        "photo": photo,
        "sha256": sha256,
        "loss": loss,
        "confidence": float(highest),
        "margin": float(highest - sum(rest)),  # to the second highest, if there is one
        "shuffle": int(sha256[:8], 16) >> 1,  # 31 bits that do not depend on anything else about the photo
        "probabilities": probabilities.astype("<f4").tobytes(),
        "ood_score": ood_score,
    }


def _rows(
    table: EvaluationTable, indices: Sequence[int], reviews: Mapping[str, Any], writer: BucketWriter
) -> Iterator[dict[str, Any]]:
    source = table.predictions
    predicted, confidence, losses = source.predicted, source.confidence, source.losses
    for i in indices:
        sha256 = source.sha256s[i]
        class_index = int(predicted[i])
        label, review = resolve_label(
            reviews.get(sha256),
            label=int(source.labels[i]),
            predicted=class_index,
            classes=source.classes,
            source=table.source,
        )
        key = (
            table.source,
            encode_file_name(source.splits[i]),
            label,
            class_index,
            confidence_percent(float(confidence[i])),
            review,
            bool(table.duplicate[i]),
            bool(table.mislabeled[i]),
            bool(table.unlike[i]),
        )
        photo = encode_file_name(source.image_names[i])
        score = None if source.ood_scores is None else float(source.ood_scores[i])
        bucket_id, probabilities = writer.get_or_create(key), source.probabilities[i]
        row = prediction_row(bucket_id, photo, sha256, probabilities, loss=float(losses[i]), ood_score=score)
        yield row | {"model_id": writer.model_id}


def production_loss(probabilities: bytes, label: int) -> float:
    """Return the stored loss of a production photo: UNKNOWN until it has a label."""
    if label == UNKNOWN:
        return float(UNKNOWN)
    values = np.frombuffer(probabilities, dtype="<f4").astype(np.float64)
    return float(cross_entropy(np.array([label]), values[None])[0])


def confidence_percent(confidence: float) -> int:
    """Round a confidence down to whole percent, at most 99."""
    return bisect.bisect_right(_PERCENTS, confidence) - 1


def _load_photos(connection: Connection, model_id: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the id and the bucket of each photo of a model by its name and sha256."""
    columns = predictions.c.photo, predictions.c.sha256, predictions.c.id, predictions.c.bucket_id
    rows = connection.execute(select(*columns).where(predictions.c.model_id == model_id))
    return {(photo, sha256): (id_, bucket_id) for photo, sha256, id_, bucket_id in rows}


def _load_reviews(connection: Connection) -> dict[str, Any]:
    columns = current_reviews.c
    rows = connection.execute(select(columns.sha256, columns.decision, columns.new_label))
    return {row.sha256: row for row in rows}

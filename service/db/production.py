"""Predictions that were answered, kept with their photos where the operator says so, within a number and an age."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, case, delete, func, insert, select, update

from service.db.ingest import (
    BucketTotals,
    BucketWriter,
    compute_margins,
    confidence_percent,
    production_loss,
    resolve_label,
    shuffle_key,
)
from service.db.schema import buckets, current_reviews, predictions, production_images

NAME_PREFIX = "production"


@dataclass(frozen=True, eq=False)
class ServedPrediction:
    """A photo as it arrived, and the (C,) probabilities that it was answered."""

    data: bytes
    sha256: str
    probabilities: NDArray[np.float32]
    received_at: datetime


def production_name(sha256: str) -> str:
    """What a live photo is called in a grid: it has no name of its own that is safe to show."""
    return f"{NAME_PREFIX}/{sha256[:16]}"


def save_predictions(connection: Connection, model_id: int, classes: Sequence[str], served: Sequence[ServedPrediction]) -> int:
    """Enter answered photos; one that the model has answered before stays as it is. Returns how many are new to it."""
    places = BucketWriter(connection, model_id)
    tally = BucketTotals()
    new = 0
    for photo in served:
        kept = select(production_images.c.sha256).where(production_images.c.sha256 == photo.sha256)
        if connection.execute(kept).first() is None:
            data = {"sha256": photo.sha256, "data": photo.data, "received_at": photo.received_at}
            connection.execute(insert(production_images).values(data))
        name = production_name(photo.sha256)
        known = select(predictions.c.id).where(
            predictions.c.model_id == model_id, predictions.c.photo == name, predictions.c.sha256 == photo.sha256
        )
        if connection.execute(known).first() is not None:
            continue
        guess, confidence = int(photo.probabilities.argmax()), float(photo.probabilities.max())
        review = connection.execute(select(current_reviews).where(current_reviews.c.sha256 == photo.sha256)).first()
        label, state = resolve_label(review, label=guess, predicted=guess, classes=classes, source="production")
        cell = places.get_or_create(("production", "", label, guess, confidence_percent(confidence), state, False, False))
        values = photo.probabilities.astype("<f4").tobytes()
        row = {
            "model_id": model_id,
            "bucket_id": cell,
            "photo": name,
            "sha256": photo.sha256,
            "loss": production_loss(values, label),
            "confidence": confidence,
            "margin": float(compute_margins(photo.probabilities[None])[0]),
            "shuffle": shuffle_key(photo.sha256),
            "probabilities": values,
        }
        connection.execute(insert(predictions).values(row))
        tally.add(row)
        new += 1
    places.add(tally)
    return new


def prune(connection: Connection, *, max_images: int, days: float) -> int:
    """Delete saved images that are older than ``days``, then the excess over ``max_images``.

    Of the excess, images without a decision go first, the oldest of them before others. Returns how many were deleted.
    What was decided about them stays in the history.
    """
    columns = production_images.c
    until = datetime.now(timezone.utc) - timedelta(days=days)
    gone = list(connection.execute(select(columns.sha256).where(columns.received_at < until)).scalars())
    total = connection.execute(select(func.count()).select_from(production_images)).scalar_one()
    if (over := total - len(gone) - max_images) > 0:
        reviewed = case((current_reviews.c.sha256.is_not(None), 1), else_=0)
        found = (
            select(columns.sha256)
            .outerjoin(current_reviews, current_reviews.c.sha256 == columns.sha256)
            .where(columns.received_at >= until)
            .order_by(reviewed, columns.received_at, columns.sha256)
            .limit(over)
        )
        gone += connection.execute(found).scalars()
    for sha256 in gone:
        _forget(connection, sha256)
    return len(gone)


def load_image(connection: Connection, sha256: str) -> bytes | None:
    """A kept photo, as it arrived."""
    return connection.execute(select(production_images.c.data).where(production_images.c.sha256 == sha256)).scalar()


def is_saved(connection: Connection, sha256: str) -> bool:
    return (
        connection.execute(select(production_images.c.sha256).where(production_images.c.sha256 == sha256)).first() is not None
    )


def labeled_images(connection: Connection) -> Iterator[tuple[str, str]]:
    """The sha256 and the class of every kept photo that was given one, in their order."""
    found = (
        select(production_images.c.sha256, current_reviews.c.new_label)
        .join(current_reviews, current_reviews.c.sha256 == production_images.c.sha256)
        .where(current_reviews.c.decision == "label")
        .order_by(current_reviews.c.new_label, production_images.c.sha256)
    )
    for sha256, label in connection.execute(found):
        yield sha256, str(label)


def _forget(connection: Connection, sha256: str) -> None:
    mine = (predictions.c.sha256 == sha256) & (predictions.c.photo == production_name(sha256))
    in_cells = connection.execute(
        select(predictions.c.bucket_id, func.count()).where(mine).group_by(predictions.c.bucket_id)
    ).all()
    for bucket_id, photos in in_cells:
        connection.execute(update(buckets).where(buckets.c.id == bucket_id).values(images=buckets.c.images - photos))
    connection.execute(delete(predictions).where(mine))
    connection.execute(delete(production_images).where(production_images.c.sha256 == sha256))


def file_suffix(data: bytes) -> str:
    """What a photo's file is called at its end, by its first bytes."""
    return next((suffix for start, suffix in _SUFFIXES.items() if data.startswith(start)), ".jpg")


_SUFFIXES = {b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp", b"II": ".tif", b"MM": ".tif"}

"""Store the images and predictions of /predict requests if the operator enables it, within limits of number, size and age."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, case, delete, func, insert, select

from models.heif_structure import file_format
from service.db.ingest import (
    BucketTotals,
    BucketWriter,
    confidence_percent,
    prediction_row,
    production_loss,
    remove_from_bucket,
    resolve_label,
)
from service.db.schema import current_reviews, predictions, production_images

NAME_PREFIX = "production"


@dataclass(frozen=True, eq=False)
class ServedPrediction:
    """An image as it was received, and the results of its prediction.

    ``probabilities`` is (C,). ``ood_score`` is None if the model has none. ``unlike`` is whether the image is unlike the
    training images.
    """

    data: bytes
    sha256: str
    probabilities: NDArray[np.float32]
    received_at: datetime
    ood_score: float | None = None
    unlike: bool = False


def production_name(sha256: str) -> str:
    """Return the name of a production photo. The client's file name is not safe to show."""
    return f"{NAME_PREFIX}/{sha256[:16]}"


def save_predictions(connection: Connection, model_id: int, classes: Sequence[str], served: Sequence[ServedPrediction]) -> int:
    """Save predictions with their images. An image that the model has predicted before keeps its first prediction.

    Returns:
        The number of predictions that are new to the model.
    """
    writer = BucketWriter(connection, model_id)
    totals = BucketTotals()
    new = 0
    for image in served:
        if not is_saved(connection, image.sha256):
            data = {"sha256": image.sha256, "data": image.data, "received_at": image.received_at}
            connection.execute(insert(production_images).values(data))
        name = production_name(image.sha256)
        known = select(predictions.c.id).where(
            predictions.c.model_id == model_id, predictions.c.photo == name, predictions.c.sha256 == image.sha256
        )
        if connection.execute(known).first() is not None:
            continue
        predicted, confidence = int(image.probabilities.argmax()), float(image.probabilities.max())
        review = connection.execute(select(current_reviews).where(current_reviews.c.sha256 == image.sha256)).first()
        label, state = resolve_label(review, label=predicted, predicted=predicted, classes=classes, source="production")
        key = ("production", "", label, predicted, confidence_percent(confidence), state, False, False, image.unlike)
        loss = production_loss(image.probabilities.astype("<f4").tobytes(), label)
        bucket_id = writer.get_or_create(key)
        row = prediction_row(bucket_id, name, image.sha256, image.probabilities, loss=loss, ood_score=image.ood_score)
        row |= {"model_id": model_id, "received_at": image.received_at}
        connection.execute(insert(predictions).values(row))
        totals.add(row)
        new += 1
    writer.add(totals)
    return new


def prune(connection: Connection, *, max_images: int, max_bytes: int, days: float) -> int:
    """Delete saved images that are too old, and then the oldest ones that exceed the number or the total size.

    The most recent images are kept, and images with a review before all others. Reviews of deleted images stay in the history.

    Returns:
        The number of deleted images.
    """
    columns = production_images.c
    oldest = datetime.now(timezone.utc) - timedelta(days=days)
    expired = list(connection.execute(select(columns.sha256).where(columns.received_at < oldest)).scalars())
    is_reviewed = case((current_reviews.c.sha256.is_not(None), 1), else_=0)
    by_priority = (
        select(columns.sha256, func.length(columns.data))
        .outerjoin(current_reviews, current_reviews.c.sha256 == columns.sha256)
        .where(columns.received_at >= oldest)
        .order_by(is_reviewed.desc(), columns.received_at.desc(), columns.sha256.desc())
    )
    images, total_bytes, excess = 0, 0, []
    for sha256, size in connection.execute(by_priority):
        if images >= max_images or total_bytes + size > max_bytes:
            excess.append(sha256)
        else:
            images, total_bytes = images + 1, total_bytes + size
    for sha256 in (*expired, *excess):
        _delete(connection, sha256)
    return len(expired) + len(excess)


def load_image(connection: Connection, sha256: str) -> bytes | None:
    """Load a saved image as it was received."""
    return connection.execute(select(production_images.c.data).where(production_images.c.sha256 == sha256)).scalar()


def is_saved(connection: Connection, sha256: str) -> bool:
    """Return whether an image is saved."""
    saved = select(production_images.c.sha256).where(production_images.c.sha256 == sha256)
    return connection.execute(saved).first() is not None


def labeled_images(connection: Connection) -> Iterator[tuple[str, str]]:
    """Yield the sha256 and the class of every saved image that a reviewer labeled, and ``neither`` for none of the classes."""
    folder = case((current_reviews.c.decision == "label", current_reviews.c.new_label), else_="neither")
    labeled = (
        select(production_images.c.sha256, folder.label("folder"))
        .join(current_reviews, current_reviews.c.sha256 == production_images.c.sha256)
        .where(current_reviews.c.decision.in_(("label", "neither")))
        .order_by(folder, production_images.c.sha256)
    )
    for sha256, label in connection.execute(labeled):
        yield sha256, str(label)


def _delete(connection: Connection, sha256: str) -> None:
    own = (predictions.c.sha256 == sha256) & (predictions.c.photo == production_name(sha256))
    by_bucket = select(predictions.c.bucket_id, func.count()).where(own).group_by(predictions.c.bucket_id)
    for bucket_id, images in connection.execute(by_bucket).all():
        remove_from_bucket(connection, bucket_id, images)
    connection.execute(delete(predictions).where(own))
    connection.execute(delete(production_images).where(production_images.c.sha256 == sha256))


def file_suffix(data: bytes) -> str:
    """Return the file name suffix for an image, from its first bytes."""
    if container := file_format(data):
        return f".{container.lower()}"
    return next((suffix for start, suffix in _SUFFIXES.items() if data.startswith(start)), ".jpg")


_SUFFIXES = {
    b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp", b"II": ".tif", b"MM": ".tif", b"P": ".ppm",
}  # fmt: skip

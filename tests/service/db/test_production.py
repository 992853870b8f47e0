"""Saved production photos are limited by number, size and age, and reviewed ones are kept longest."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import func, select

from models.artifacts.data_folder import is_image_name
from service.db.connection import Database
from service.db.filter import UNLABELED, Filter
from service.db.ingest import get_or_create_model
from service.db.production import (
    ServedPrediction,
    file_suffix,
    labeled_images,
    load_image,
    production_name,
    prune,
    save_predictions,
)
from service.db.query import PredictionQuery, count_unreviewed_production
from service.db.records import PredictionRecord
from service.db.schema import predictions, production_images
from service.reviews.decisions import ReviewDecision, current_decision, load_history, save_decision
from tests.helpers.gallery_rows import VERSION, check_buckets, import_table, make_predictions
from tests.helpers.odd_images import picture, saved

CLASSES = ("cats", "dogs")
NOW = datetime.now(timezone.utc)


def answered(number: int, *, age_days: float = 0.0, p_dogs: float = 0.75) -> ServedPrediction:
    data = f"photo {number}".encode()
    values = np.array([1 - p_dogs, p_dogs], dtype=np.float32)
    return ServedPrediction(
        data, hashlib.sha256(data).hexdigest(), values, NOW - timedelta(days=age_days, seconds=-number / 1e3)
    )


def keep_all(database: Database, *photos: ServedPrediction, version: str = VERSION, classes: tuple[str, ...] = CLASSES) -> int:
    with database.write() as connection:
        model = get_or_create_model(connection, version=version, name="production", classes=classes)
        return save_predictions(connection, model, classes, photos)


def say(
    database: Database, photo: ServedPrediction, decision: str, new_label: str | None = None, *, version: str = VERSION
) -> None:
    with database.write() as connection:
        holds = current_decision(connection, photo.sha256)
        words = {"photo": production_name(photo.sha256), "sha256": photo.sha256, "model_version": version, "decision": decision}
        save_decision(connection, ReviewDecision(**words, new_label=new_label, expected_version=holds and holds.id))  # type: ignore[arg-type]


def one(database: Database, photo: ServedPrediction) -> PredictionRecord:
    with database.read() as connection:
        return PredictionQuery(connection, Filter(model=VERSION)).find(production_name(photo.sha256))


def kept(database: Database) -> set[str]:
    """Return the sha256s of the saved photos, after a check that their predictions and the buckets agree."""
    check_buckets(database)
    with database.read() as connection:
        found = set(connection.execute(select(production_images.c.sha256)).scalars())
        assert found == set(connection.execute(select(predictions.c.sha256)).scalars())
    return found


def test_a_saved_photo_is_listed(database: Database) -> None:
    assert keep_all(database, answered(1), answered(2), answered(1)) == 2
    assert keep_all(database, answered(1, p_dogs=0.1)) == 0
    photo = one(database, answered(1))
    assert (photo.source, photo.label, photo.predicted, photo.outcome, photo.review) == (
        "production",
        None,
        "dogs",
        "unlabeled",
        "unreviewed",
    )
    assert (photo.confidence, photo.margin, photo.loss, photo.true_probability) == (0.75, 0.5, None, None)
    with database.read() as connection:
        counts = PredictionQuery(connection, Filter(model=VERSION)).counts
        assert counts.facets["outcome"] == {"unlabeled": 2}
        assert counts.facets["class"] == {UNLABELED: 2}
        assert counts.facets["split"] == {}
        assert load_image(connection, answered(2).sha256) == b"photo 2"
        assert load_image(connection, answered(3).sha256) is None


@pytest.mark.parametrize(
    ("decision", "new_label", "expected"),
    [
        ("label", "dogs", ("dogs", "correct", "confirmed")),
        ("label", "cats", ("cats", "incorrect", "relabeled")),
        ("label", "birds", (None, "unlabeled", "relabeled")),
        ("neither", None, (None, "unlabeled", "neither")),
        ("bad", None, (None, "unlabeled", "bad")),
    ],
)
def test_a_decision_labels_a_photo_and_an_undo_removes_the_label(
    database: Database, decision: str, new_label: str | None, expected: tuple[str | None, str, str]
) -> None:
    photo = answered(1)
    keep_all(database, photo)
    knows_birds = replace(photo, probabilities=np.append(photo.probabilities, np.float32(0)))
    keep_all(database, knows_birds, version="birds", classes=(*CLASSES, "birds"))
    say(database, photo, decision, new_label, version="birds")
    found = one(database, photo)
    assert (found.label, found.outcome, found.review) == expected
    assert found.loss == (pytest.approx(-np.log(0.75 if expected[0] == "dogs" else 0.25)) if expected[0] else None)
    keep_all(database, photo, version="v2")  # another model predicts it: the decision applies there too
    with database.read() as connection:
        other = PredictionQuery(connection, Filter(model="v2")).find(production_name(photo.sha256))
        assert (other.label, other.outcome, other.review) == expected
        folder = {"label": new_label, "neither": "neither"}.get(decision)
        assert list(labeled_images(connection)) == ([(photo.sha256, folder)] if folder else [])
    say(database, photo, "undo")
    found = one(database, photo)
    assert (found.label, found.outcome, found.review, found.loss) == (None, "unlabeled", "unreviewed", None)
    check_buckets(database)


def test_a_photo_unlike_the_training_photos_is_flagged(database: Database) -> None:
    keep_all(database, replace(answered(1), ood_score=2.5, unlike=True), replace(answered(2), ood_score=0.5), answered(3))
    with database.read() as connection:
        query = PredictionQuery(connection, Filter(model=VERSION, flags=("unlike",)))
        (found,) = query.first(9)
        assert query.counts.facets["flag"] == {"unlike": 1}
        every = PredictionQuery(connection, Filter(model=VERSION)).first(9)
    assert (found.sha256, found.unlike, found.ood_score) == (answered(1).sha256, True, 2.5)
    assert {(photo.ood_score, photo.unlike) for photo in every} == {(2.5, True), (0.5, False), (None, False)}
    check_buckets(database)


def test_photos_above_the_limit_are_deleted_unreviewed_and_oldest_first(database: Database) -> None:
    photos = [answered(number, age_days=10 - number) for number in range(10)]
    keep_all(database, *photos)
    keep_all(database, photos[4], version="v2")
    for number in (0, 3):
        say(database, photos[number], "label", "cats")

    def prune_to(max_images: int) -> tuple[int, list[int]]:
        with database.write() as connection:
            gone = prune(connection, max_images=max_images, max_bytes=10**9, days=365)
        return gone, [number for number, photo in enumerate(photos) if photo.sha256 in kept(database)]

    assert prune_to(10) == (0, list(range(10)))
    assert prune_to(7) == (3, [0, 3, 5, 6, 7, 8, 9])
    assert prune_to(3) == (4, [0, 3, 9])
    assert prune_to(1) == (2, [3])
    with database.read() as connection:
        assert [row.new_label for row in load_history(connection, photos[0].sha256)] == ["cats"]
    assert prune_to(0) == (1, [])
    keep_all(database, photos[0])  # it comes back, and what was decided about it holds
    assert one(database, photos[0]).label == "cats"


def test_images_beyond_the_size_limit_are_deleted_unreviewed_and_oldest_first(database: Database) -> None:
    """Every image has 7 bytes, except one that would not fit alone."""
    images = [answered(number, age_days=10 - number) for number in range(6)]
    huge = replace(answered(6, age_days=1), data=bytes(30))
    keep_all(database, *images, huge)
    say(database, images[1], "label", "cats")
    with database.write() as connection:
        assert prune(connection, max_images=100, max_bytes=29, days=365) == 3
    assert kept(database) == {images[number].sha256 for number in (1, 3, 4, 5)}


def test_production_photos_have_their_time_of_arrival_and_sort_by_it(database: Database) -> None:
    images = [answered(number, age_days=number % 3) for number in range(5)]
    keep_all(database, *images)
    with database.read() as connection:
        query = PredictionQuery(connection, Filter(model=VERSION, sort="newest"))
        records = query.page(1)
        assert [record.sha256 for record in records] == [image.sha256 for image in reversed(images)]
        assert [record.received_at for record in records] == [image.received_at for image in reversed(images)]
        assert [query.neighbors(record)[0] for record in records] == [0, 1, 2, 3, 4]


def test_unreviewed_production_photos_are_counted_for_every_model(database: Database) -> None:
    images = [answered(number) for number in range(3)]
    keep_all(database, *images)
    keep_all(database, images[0], version="v2")
    say(database, images[1], "bad")
    with database.read() as connection:
        ids = {version: PredictionQuery(connection, Filter(model=version)).model.id for version in (VERSION, "v2")}
        assert count_unreviewed_production(connection) == {ids[VERSION]: 2, ids["v2"]: 1}


def test_an_evaluated_photo_with_the_same_bytes_is_found(database: Database, tmp_path: Path) -> None:
    image = answered(1)
    evaluated = make_predictions(1, 5, CLASSES)
    (row, *_) = import_table(database, replace(evaluated, sha256s=(image.sha256, *evaluated.sha256s[1:])), tmp_path)
    keep_all(database, image, answered(2))
    with database.read() as connection:
        query = PredictionQuery(connection, Filter(model=VERSION))
        (copy,) = query.copies(query.find(production_name(image.sha256)))
        assert (copy.photo, copy.label, copy.source) == (row.photo, row.label, "evaluation")
        assert query.copies(query.find(production_name(answered(2).sha256))) == []


def test_expired_photos_are_deleted_and_evaluated_ones_stay(database: Database, tmp_path: Path) -> None:
    photos = [answered(number, age_days=number) for number in range(6)]
    keep_all(database, *photos)
    say(database, photos[5], "label", "cats")
    with database.write() as connection:
        assert prune(connection, max_images=100, max_bytes=10**9, days=2.5) == 3
    assert kept(database) == {photo.sha256 for photo in photos[:3]}
    import_table(database, make_predictions(1, 20, CLASSES), tmp_path, version="v2")
    with database.write() as connection:
        assert prune(connection, max_images=1, max_bytes=10**9, days=2.5) == 2
        assert prune(connection, max_images=1, max_bytes=10**9, days=0) == 1
        assert prune(connection, max_images=1, max_bytes=10**9, days=0) == 0
        assert connection.execute(select(func.count()).select_from(predictions)).scalar_one() == 20
    check_buckets(database)


@pytest.mark.parametrize(
    ("form", "suffix"),
    [
        ("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp"), ("TIFF", ".tif"),
        ("PPM", ".ppm"), ("AVIF", ".avif"), ("HEIF", ".heif"),
    ],
)  # fmt: skip
def test_an_exported_photo_has_the_suffix_of_its_format(form: str, suffix: str) -> None:
    assert file_suffix(saved(picture(), form)) == suffix
    assert is_image_name(f"photo{suffix}")

"""Random predictions, and the expected contents of the gallery, computed from the file in plain Python."""

from __future__ import annotations

import csv
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import and_, false, func, not_, select

from models.artifacts.predictions import Predictions
from service.db.connection import Database
from service.db.filter import FLAGS, REVIEWS, UNLABELED, Filter
from service.db.ingest import EvaluationTable, get_or_create_model, import_predictions, is_imported
from service.db.query import list_models, load_buckets
from service.db.schema import RANGE_COLUMNS, buckets, predictions

CLASSES = {2: ("cats", "dogs"), 5: ("a&b", "one, two", "Größe", "猫", UNLABELED[:3])}
VERSION = "v1"


@dataclass(frozen=True)
class ExpectedRow:
    """A row of predictions.csv with the source, flags and review of the photo."""

    photo: str
    sha256: str
    label: str
    predicted: str
    confidence: float
    margin: float
    loss: float
    split: str
    source: str
    duplicate: bool
    mislabeled: bool
    unlike: bool
    review: str = "unreviewed"

    @property
    def outcome(self) -> str:
        return "correct" if self.label == self.predicted else "incorrect"

    @property
    def flags(self) -> set[str]:
        return {name for name in FLAGS if getattr(self, name)}


def sha256_of(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def make_predictions(seed: int, photos: int, classes: Sequence[str]) -> Predictions:
    """Return random predictions. Many have equal confidences, and a few have names that are not UTF-8."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(classes), photos)
    exact = np.array([1.0, 0.99, 0.58, 0.57, 0.9])  # in floating point 0.58 * 100 is less than 58
    highest = np.where(rng.random(photos) < 0.5, rng.choice(exact, photos), rng.uniform(0.52, 1, photos))
    guess = np.where(rng.random(photos) < 0.7, labels, rng.integers(0, len(classes), photos))
    probabilities = rng.dirichlet(np.ones(len(classes) - 1), photos) * (1 - highest)[:, None]
    rows = [np.insert(row, at, high) for row, at, high in zip(probabilities, guess, highest, strict=True)]
    probabilities = np.array(rows).reshape(photos, len(classes))
    tails = ["jpg", "Ä.jpg", "\udcff.jpg", "'%_\\.jpg", "a b.JPG"]
    names = tuple(f"{'Zz'[i % 2]}/{(i * 7919) % photos:04d}.{tails[i % 5 if i % 4 == 0 else 0]}" for i in range(photos))
    splits = tuple(str(split) for split in rng.choice(["train", "valid", "test, of sorts"], photos))
    return Predictions(tuple(classes), names, labels, probabilities, splits, tuple(sha256_of(name) for name in names))


def import_table(
    database: Database,
    table: Predictions,
    folder: Path,
    *,
    version: str = VERSION,
    source: str = "evaluation",
    seed: int = 0,
) -> list[ExpectedRow]:
    """Write a table, then read and import it once as the service does. Returns its rows as read by the csv module."""
    path = folder / f"{version}-{source}-{seed}.csv"
    table.write_csv(path)
    rng = random.Random(seed)
    flags = [(rng.random() < 0.1, rng.random() < 0.2, rng.random() < 0.1) for _ in table.image_names]
    duplicate, mislabeled, unlike = (np.array([row[i] for row in flags], dtype=np.bool_) for i in range(3))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with database.write(background=True) as connection:
        if not is_imported(connection, version, digest):
            model = get_or_create_model(connection, version=version, name=f"model {version}", classes=table.classes)
            stored = EvaluationTable(source, digest, Predictions.read_csv(path), duplicate, mislabeled, unlike)
            import_predictions(connection, model, stored)
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [_expected_row(row, source, *flag) for row, flag in zip(csv.DictReader(file), flags, strict=True)]


def _expected_row(row: dict[str, str], source: str, duplicate: bool, mislabeled: bool, unlike: bool) -> ExpectedRow:
    probabilities = sorted((float(value) for name, value in row.items() if name.startswith("p_")), reverse=True)
    photo = row["photo"].replace("\udcff", "\uf7ff")
    highest, second = probabilities[:2]
    values = row["label"], row["predicted"], highest, highest - second, float(row["loss"]), row["split"]
    return ExpectedRow(photo, row["sha256"], *values, source, duplicate, mislabeled, unlike)


CHECKS: dict[str, Callable[[ExpectedRow, Filter], bool]] = {
    "outcome": lambda row, filters: not filters.outcomes or row.outcome in filters.outcomes,
    "class": lambda row, filters: not filters.labels or row.label in filters.labels,
    "predicted": lambda row, filters: not filters.predicted or row.predicted in filters.predicted,
    "source": lambda row, filters: not filters.sources or row.source in filters.sources,
    "split": lambda row, filters: not filters.splits or row.split in filters.splits,
    "review": lambda row, filters: not filters.reviews or row.review in filters.reviews,
    "flag": lambda row, filters: not filters.flags or bool(row.flags & set(filters.flags)),
    "confidence": lambda row, filters: (
        filters.confidence[0] / 100 <= row.confidence
        and (filters.confidence[1] == 100 or row.confidence < filters.confidence[1] / 100)
    ),
}


def matches(row: ExpectedRow, filters: Filter, *, ignoring: str = "") -> bool:
    """Return whether a row matches a filter, with one facet of it ignored."""
    return all(check(row, filters) for name, check in CHECKS.items() if name != ignoring)


def any_filter(rng: random.Random, rows: Sequence[ExpectedRow], classes: Sequence[str]) -> Filter:
    """Return a random filter that often has matches."""

    def some(values: Sequence[str]) -> tuple[str, ...]:
        return tuple(rng.sample(list(values), rng.choice((0, 0, 0, 1, min(2, len(values))))))

    low = rng.choice((0, 0, 50, 57, 58, rng.randrange(99)))
    return Filter(
        model=VERSION,
        outcomes=some(("correct", "incorrect")),
        labels=some(classes),
        predicted=some(classes),
        sources=some(sorted({row.source for row in rows})),
        splits=some(sorted({row.split for row in rows})),
        reviews=some(REVIEWS) if any(row.review != "unreviewed" for row in rows) else (),
        flags=some(FLAGS),
        confidence=(low, rng.choice((100, 100, 58, 99)) if low < 58 else 100),
    )


def with_reviews(rows: Sequence[ExpectedRow], decisions: dict[str, tuple[str, str | None]]) -> list[ExpectedRow]:
    """Return the rows with the current decisions applied, by sha256."""
    found = []
    for row in rows:
        decision, new_label = decisions.get(row.sha256, ("", None))
        state = ("confirmed" if new_label == row.label else "relabeled") if decision == "label" else decision or "unreviewed"
        found.append(replace(row, review=state))
    return found


def check_buckets(database: Database) -> None:
    """Check that each bucket has the count of its predictions and covers their ranges."""
    inside = [predictions.c[name].between(buckets.c[f"{name}_low"], buckets.c[f"{name}_high"]) for name in RANGE_COLUMNS]
    outside = select(predictions.c.id).join(buckets).where(not_(func.coalesce(and_(*inside), false())))
    with database.read() as connection:
        assert connection.execute(outside).all() == []
        by_bucket = select(predictions.c.bucket_id, func.count()).group_by(predictions.c.bucket_id)
        counted = {row[0]: row[1] for row in connection.execute(by_bucket)}
        recorded = {row[0]: row[1] for row in connection.execute(select(buckets.c.id, buckets.c.images))}
    assert {id_: photos for id_, photos in recorded.items() if photos} == counted


def count_buckets(database: Database) -> dict[str, Counter[tuple[Any, ...]]]:
    """Return the counts of the buckets by model version, without bucket ids."""
    with database.read() as connection:
        return {
            model.version: Counter(
                {
                    (
                        c.source,
                        c.split,
                        c.label,
                        c.predicted,
                        c.percent,
                        c.review,
                        c.duplicate,
                        c.mislabeled,
                        c.unlike,
                    ): c.images
                    for c in load_buckets(connection, model)
                }
            )
            for model in list_models(connection)
        }

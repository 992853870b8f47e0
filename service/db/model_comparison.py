"""Compare two models on the same photos, with the current labels as the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, case, func, select

from models.artifacts.statistics import mcnemar_p_value
from models.errors import list_names
from service.db.errors import IncompatibleModelsError
from service.db.records import ModelRecord
from service.db.schema import UNKNOWN, buckets, current_reviews, predictions

EXCLUDED, LABEL_CONFLICT = -2, -3  # instead of a true class: reviewed as neither or bad; two labels and no review


@dataclass(frozen=True)
class ModelComparison:
    """Counts of photos by the outcomes of two models a and b. ``fixed``: a is wrong and b is right; ``broke``: vice versa."""

    both_correct: int
    both_incorrect: int
    fixed: int
    broke: int
    excluded: int
    label_conflicts: int
    unlabeled: int
    only_a: int
    only_b: int

    @property
    def common(self) -> int:
        return self.both_correct + self.both_incorrect + self.fixed + self.broke

    @property
    def p_value(self) -> float:
        """The two-sided p value of McNemar's exact test."""
        return mcnemar_p_value(self.fixed, self.broke)


def compare_models(connection: Connection, a: ModelRecord, b: ModelRecord) -> ModelComparison:
    """Count the photos that both models have predicted.

    Raises:
        IncompatibleModelsError: The models have different classes.
    """
    pairs = _pairs(a, b).subquery()
    columns = pairs.c.truth, pairs.c.a_correct, pairs.c.b_correct
    outcomes = dict.fromkeys([(False, False), (False, True), (True, False), (True, True)], 0)
    skipped = dict.fromkeys([UNKNOWN, EXCLUDED, LABEL_CONFLICT], 0)
    for truth, a_correct, b_correct, images in connection.execute(select(*columns, func.count()).group_by(*columns)):
        if truth < 0:
            skipped[truth] += images
        else:
            outcomes[bool(a_correct), bool(b_correct)] += images
    common = sum(outcomes.values()) + sum(skipped.values())
    return ModelComparison(
        both_correct=outcomes[True, True],
        both_incorrect=outcomes[False, False],
        fixed=outcomes[False, True],
        broke=outcomes[True, False],
        excluded=skipped[EXCLUDED],
        label_conflicts=skipped[LABEL_CONFLICT],
        unlabeled=skipped[UNKNOWN],
        only_a=_count_images(connection, a) - common,
        only_b=_count_images(connection, b) - common,
    )


def select_changed(model: ModelRecord, baseline: ModelRecord, change: str) -> Select[Any]:
    """Select the ids of ``model``'s predictions with this change of outcome from ``baseline`` (one of filter.CHANGES)."""
    if change == "disagree":
        pairs = _pairs(baseline, model).subquery()
        return select(pairs.c.b_id).where(pairs.c.a_predicted != pairs.c.b_predicted)
    baseline_correct, correct = {"fixed": (0, 1), "broke": (1, 0), "both-correct": (1, 1), "both-incorrect": (0, 0)}[change]
    pairs = _pairs(baseline, model).subquery()
    return select(pairs.c.b_id).where(pairs.c.truth >= 0, pairs.c.a_correct == baseline_correct, pairs.c.b_correct == correct)


def _pairs(a: ModelRecord, b: ModelRecord) -> Select[Any]:
    """Select a row per photo that both predicted: b's prediction, the true class, and which is correct (0 or 1)."""
    if a.classes != b.classes:
        raise IncompatibleModelsError(
            f"The models {a.version} and {b.version} have different classes ({list_names(a.classes, 5)} and "
            f"{list_names(b.classes, 5)}). Compare two models with the same classes."
        )
    of_a, of_b = predictions.alias("of_a"), predictions.alias("of_b")
    bucket_a, bucket_b = buckets.alias("bucket_a"), buckets.alias("bucket_b")
    truth = _truth(bucket_a.c.label, bucket_b.c.label, b.classes)
    return (
        select(
            of_b.c.id.label("b_id"),
            truth.label("truth"),
            bucket_a.c.predicted.label("a_predicted"),
            bucket_b.c.predicted.label("b_predicted"),
            case((bucket_a.c.predicted == truth, 1), else_=0).label("a_correct"),
            case((bucket_b.c.predicted == truth, 1), else_=0).label("b_correct"),
        )
        .select_from(of_b)
        .join(of_a, and_(of_a.c.model_id == a.id, of_a.c.photo == of_b.c.photo, of_a.c.sha256 == of_b.c.sha256))
        .join(bucket_a, bucket_a.c.id == of_a.c.bucket_id)
        .join(bucket_b, bucket_b.c.id == of_b.c.bucket_id)
        .outerjoin(current_reviews, current_reviews.c.sha256 == of_b.c.sha256)
        .where(of_b.c.model_id == b.id)
    )


def _truth(a: ColumnElement[int], b: ColumnElement[int], classes: tuple[str, ...]) -> ColumnElement[int]:
    """Return the reviewed class, or without a review the label that both models were evaluated with."""
    review = current_reviews.c
    reviewed = [(and_(review.decision == "label", review.new_label == name), i) for i, name in enumerate(classes)]
    return case(*reviewed, (review.decision.is_not(None), EXCLUDED), (a == b, a), else_=LABEL_CONFLICT)


def _count_images(connection: Connection, model: ModelRecord) -> int:
    total = select(func.coalesce(func.sum(buckets.c.images), 0)).where(buckets.c.model_id == model.id)
    return int(connection.execute(total).scalar_one())

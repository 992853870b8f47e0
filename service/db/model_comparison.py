"""Two models on the same photos: which of them has each right, judged by what is held true now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, Select, and_, case, func, select

from service.db.schema import UNKNOWN, buckets, current_reviews, predictions
from service.http.errors import Problem

if TYPE_CHECKING:
    from service.db.query import ModelRecord

EXCLUDED, LABEL_CONFLICT = -2, -3  # in place of a true class: neither or a bad photo; two labels and no decision


@dataclass(frozen=True)
class ModelComparison:
    """How many photos two models, a and b, have right and wrong; ``fixed`` are those that a has wrong and b right."""

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
        """McNemar's exact test: how likely a split of the changed photos at least so uneven is where neither is better."""
        select_changed = self.fixed + self.broke
        ways = tail = 1  # to choose none, one, two... of the changed photos
        for i in range(min(self.fixed, self.broke)):
            ways = ways * (select_changed - i) // (i + 1)
            tail += ways
        return min(1.0, 2 * tail / 2**select_changed)


def compare_models(connection: Connection, a: ModelRecord, b: ModelRecord) -> ModelComparison:
    """Count the photos that both models were asked; raises Problem where their classes are not the same."""
    pairs = _pairs(a, b).subquery()
    found = select(pairs.c.truth, pairs.c.a_right, pairs.c.b_right, func.count()).group_by(
        pairs.c.truth, pairs.c.a_right, pairs.c.b_right
    )
    judged = dict.fromkeys([(False, False), (False, True), (True, False), (True, True)], 0)
    aside = dict.fromkeys([UNKNOWN, EXCLUDED, LABEL_CONFLICT], 0)
    for truth, a_right, b_right, photos in connection.execute(found):
        if truth < 0:
            aside[truth] += photos
        else:
            judged[bool(a_right), bool(b_right)] += photos
    common = sum(judged.values()) + sum(aside.values())
    return ModelComparison(
        both_correct=judged[True, True],
        both_incorrect=judged[False, False],
        fixed=judged[False, True],
        broke=judged[True, False],
        excluded=aside[EXCLUDED],
        label_conflicts=aside[LABEL_CONFLICT],
        unlabeled=aside[UNKNOWN],
        only_a=_photos(connection, a) - common,
        only_b=_photos(connection, b) - common,
    )


def select_changed(model: ModelRecord, baseline: ModelRecord, change: str) -> Select[Any]:
    """The ids of ``model``'s predictions whose outcome differs from ``baseline``'s as ``change`` says, or does not differ."""
    vs_right, right = {"fixed": (0, 1), "broke": (1, 0), "both-correct": (1, 1), "both-incorrect": (0, 0)}[change]
    pairs = _pairs(baseline, model).subquery()
    return select(pairs.c.b_id).where(pairs.c.truth >= 0, pairs.c.a_right == vs_right, pairs.c.b_right == right)


def _pairs(a: ModelRecord, b: ModelRecord) -> Select[Any]:
    """A row for each photo that both were asked: b's prediction, the true class, and who has it right (0 or 1)."""
    if a.classes != b.classes:
        raise Problem(
            "bad_parameter",
            f"The models {a.version} and {b.version} have other classes ({', '.join(a.classes[:5])} against "
            f"{', '.join(b.classes[:5])}) and cannot be compared; give two with the same.",
        )
    of_a, of_b = predictions.alias("of_a"), predictions.alias("of_b")
    cell_a, cell_b = buckets.alias("cell_a"), buckets.alias("cell_b")
    truth = _truth(cell_a.c.label, cell_b.c.label, b.classes)
    return (
        select(
            of_b.c.id.label("b_id"),
            truth.label("truth"),
            case((cell_a.c.predicted == truth, 1), else_=0).label("a_right"),
            case((cell_b.c.predicted == truth, 1), else_=0).label("b_right"),
        )
        .select_from(of_b)
        .join(of_a, and_(of_a.c.model_id == a.id, of_a.c.photo == of_b.c.photo, of_a.c.sha256 == of_b.c.sha256))
        .join(cell_a, cell_a.c.id == of_a.c.bucket_id)
        .join(cell_b, cell_b.c.id == of_b.c.bucket_id)
        .outerjoin(current_reviews, current_reviews.c.sha256 == of_b.c.sha256)
        .where(of_b.c.model_id == b.id)
    )


def _truth(a: ColumnElement[int], b: ColumnElement[int], classes: tuple[str, ...]) -> ColumnElement[int]:
    """A reviewer's word counts; without one, the label that both were evaluated with."""
    review = current_reviews.c
    decided = [(and_(review.decision == "label", review.new_label == name), i) for i, name in enumerate(classes)]
    return case(*decided, (review.decision.is_not(None), EXCLUDED), (a == b, a), else_=LABEL_CONFLICT)


def _photos(connection: Connection, model: ModelRecord) -> int:
    return int(
        connection.execute(
            select(func.coalesce(func.sum(buckets.c.images), 0)).where(buckets.c.model_id == model.id)
        ).scalar_one()
    )

"""What a minimum probability does to the evaluated photos: how many get no label, the precision, and the mistakes left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from flask import Blueprint, Response, request
from numpy.typing import NDArray

from models.artifacts.statistics import wilson_interval
from service.context import gallery
from service.db.facets import has_groups
from service.db.filter import UNLABELED, Filter, parse_int
from service.db.query import PredictionQuery
from service.db.records import Bucket
from service.gallery.commands import find_bundle
from service.gallery.grid import render_gallery
from service.gallery.sidebar import grid_url
from service.http.errors import Problem
from service.web.layout import problem_page

SOURCES = ("evaluation", "out-of-fold")
DEFAULT_PERCENT = 90
STEPS = (50, 70, 80, 90, 95, 98, 99)
MAX_LISTED = 30
WIDTH, HEIGHT = 600, 220  # of the plot

bp = Blueprint("threshold", __name__)


@dataclass(frozen=True, eq=False)
class PercentCounts:
    """Correct and incorrect predictions by whole percent of confidence, (100,) each. ``name`` is a class, or empty for all."""

    name: str
    correct: NDArray[np.int64]
    incorrect: NDArray[np.int64]

    @property
    def photos(self) -> int:
        return int(self.correct.sum() + self.incorrect.sum())

    def at(self, percent: int) -> ThresholdOutcome:
        """Apply a threshold."""
        kept = int(self.correct[percent:].sum()), int(self.incorrect[percent:].sum())
        return ThresholdOutcome(self.name, percent, self.photos, *kept)


@dataclass(frozen=True)
class ThresholdOutcome:
    """What a threshold does to the photos that are predicted as a class: ``correct`` and ``mistakes`` keep their label."""

    name: str
    percent: int
    photos: int
    correct: int
    mistakes: int

    @property
    def kept(self) -> int:
        return self.correct + self.mistakes

    @property
    def abstaining(self) -> int:
        return self.photos - self.kept

    @property
    def precision(self) -> dict[str, float] | None:
        """With its 95% Wilson interval; None if no photo keeps its label."""
        return wilson_interval(self.correct, self.kept) if self.kept else None

    @property
    def abstention(self) -> dict[str, float] | None:
        return wilson_interval(self.abstaining, self.photos) if self.photos else None


def count_by_percent(buckets: Iterable[Bucket], classes: Sequence[str]) -> list[PercentCounts]:
    """Count the labeled evaluated photos: all of them first, then those predicted as each class."""
    counts = np.zeros((2, len(classes), 100), dtype=np.int64)
    index = {name: number for number, name in enumerate(classes)}
    for bucket in buckets:
        if bucket.source in SOURCES and bucket.label != UNLABELED:
            counts[int(bucket.label == bucket.predicted), index[bucket.predicted], bucket.percent] += bucket.images
    incorrect, correct = counts
    by_class = [PercentCounts(name, correct[i], incorrect[i]) for i, name in enumerate(classes)]
    return [PercentCounts("", correct.sum(axis=0), incorrect.sum(axis=0)), *by_class]


@bp.get("/gallery/threshold")
def page() -> Response:
    """Show the outcome of the threshold ``percent`` for the model, or for the photos predicted as one class."""
    for name in request.args:
        if name not in ("model", "predicted", "percent"):
            raise Problem("bad_parameter", f'Unknown parameter "{name}". Valid parameters: model, predicted, percent.')
    percent = parse_int(request.args, "percent", DEFAULT_PERCENT, min_value=0, max_value=99)
    predicted = request.args.get("predicted", "")
    version = request.args.get("model") or gallery().active_version or ""
    filters = Filter(model=version, sources=SOURCES, predicted=(predicted,) if predicted else ())
    with gallery().database.read() as connection:
        query = PredictionQuery(connection, filters)
        everything, *by_class = count_by_percent(query.buckets, query.model.classes)
        in_groups = has_groups(connection, query.model.id)
    selected = next(counts for counts in (everything, *by_class) if counts.name == predicted)
    outcomes = [counts.at(percent) for counts in by_class]
    listed = (
        sorted(outcomes, key=lambda row: (-row.mistakes, -row.abstaining, row.name)) if len(outcomes) > MAX_LISTED else outcomes
    )
    bundle = find_bundle(version)
    return render_gallery(
        "gallery/threshold.html",
        model_shown=query.model,
        served=gallery().active_version,
        classes=query.model.classes,
        predicted=predicted,
        percent=percent,
        steps=STEPS,
        outcome=selected.at(percent),
        without=selected.at(0),
        rows=listed[:MAX_LISTED],
        has_groups=in_groups,
        more=len(outcomes) - len(listed[:MAX_LISTED]),
        in_use=bundle.decision_rule.min_probability if bundle else {},
        plot=draw_curves(selected),
        size=(WIDTH, HEIGHT),
        marker=_x(percent),
        abstaining_url=lambda row: _url(filters, row, (0, percent)),
        mistakes_url=lambda row: _url(filters.replace(outcomes=("incorrect",)), row, (percent, 100)),
    )


@bp.errorhandler(Problem)
def handle_problem(problem: Problem) -> Response:
    return problem_page(problem)


def draw_curves(counts: PercentCounts) -> dict[str, str]:
    """Return the points of the polylines of precision and of labeled photos over the threshold, from 0 to 100% each."""
    outcomes = [counts.at(percent) for percent in range(100)]
    precision = [(row.percent, row.correct / row.kept) for row in outcomes if row.kept]
    labeled = [(row.percent, row.kept / row.photos) for row in outcomes if row.photos]
    return {
        name: " ".join(f"{_x(percent):.1f},{HEIGHT * (1 - value):.1f}" for percent, value in points)
        for name, points in (("precision", precision), ("labeled", labeled))
    }


def _x(percent: int) -> float:
    return WIDTH * percent / 100


def _url(filters: Filter, row: ThresholdOutcome, confidence: tuple[int, int]) -> str:
    predicted = (row.name,) if row.name else filters.predicted
    return grid_url(filters.replace(predicted=predicted, confidence=confidence))

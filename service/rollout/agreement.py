"""Decide whether a bundle may replace the current one: same classes, and same labels for recent images."""

from __future__ import annotations

from collections.abc import Collection

from models.errors import list_names
from service.http.errors import Problem
from service.inference.model_manager import LoadedModel
from service.inference.recent_predictions import Agreement, RecentPrediction, RecentPredictions

ALLOWED_DIFFERENCES = ("classes", "disagreement")  # what a request may allow to differ


class IncompatibleBundle(Problem):
    """A bundle that differs from the current one.

    ``difference`` is the one of ``ALLOWED_DIFFERENCES`` that permits it. ``reason`` is the detail without how to do that.
    """

    def __init__(self, difference: str, reason: str) -> None:
        super().__init__("bundle_incompatible", f'{reason} If that is intended, send "allow": ["{difference}"].')
        self.difference, self.reason = difference, reason


def measure_agreement(
    current: LoadedModel, model: LoadedModel, recent: RecentPredictions
) -> tuple[Agreement, list[RecentPrediction]]:
    """Run a model on the recent images of the current one.

    Returns:
        How far the labels agree, and the model's own predictions. Nothing is compared if the classes or the
        preprocessing differ.
    """
    if model.bundle.classes != current.bundle.classes:
        return Agreement(skipped_reason="the classes differ"), []
    if _pixel_fields(model) != _pixel_fields(current):
        return Agreement(skipped_reason="the preprocessing differs, and only preprocessed pixels are kept"), []
    return recent.compare(current.bundle.version, model.engine, model.bundle.version, model.rule)


def rejection_reason(
    current: LoadedModel, model: LoadedModel, agreement: Agreement, *, min_agreement: float, allow: Collection[str]
) -> IncompatibleBundle | None:
    """Return why ``model`` must not replace ``current``, or None.

    Args:
        current: The model that serves.
        model: The candidate.
        agreement: Of the two on recent images.
        min_agreement: Required fraction of equal labels.
        allow: The ``ALLOWED_DIFFERENCES`` that are accepted.
    """
    if model.bundle.classes != current.bundle.classes and "classes" not in allow:
        return IncompatibleBundle(
            "classes",
            f"The bundle has the classes {list_names(model.bundle.classes)}, the current one "
            f"{list_names(current.bundle.classes)}, in this order.",
        )
    if agreement.fraction < min_agreement and "disagreement" not in allow:
        images = "image" if agreement.compared == 1 else "images"
        return IncompatibleBundle(
            "disagreement",
            f"The bundle agrees with the current one on {agreement.agreed} of the last {agreement.compared} {images}, "
            f"but MIN_AGREEMENT is {min_agreement:.0%}.",
        )
    return None


def _pixel_fields(model: LoadedModel) -> tuple[object, ...]:
    """The preprocessing that determines the pixels. Normalization is part of the graph."""
    preprocessing = model.bundle.preprocessing
    return preprocessing.input_px, preprocessing.resize_px, preprocessing.interpolation, preprocessing.channels

"""Whether a bundle can follow the one that serves: the same classes, and the same labels for the last answered photos."""

from __future__ import annotations

from collections.abc import Collection

from service.http.errors import Problem
from service.inference.model_manager import LoadedModel
from service.inference.recent_predictions import Agreement, RecentPrediction, RecentPredictions

ALLOWED_DIFFERENCES = ("classes", "disagreement")  # what may differ where it is said to be meant


def measure_agreement(
    current: LoadedModel, model: LoadedModel, recent: RecentPredictions
) -> tuple[Agreement, list[RecentPrediction]]:
    """How far ``model`` gives the answers that ``current`` gave to ``recent`` photos, and its own answers to them.

    Left out where the pixels that were kept are not those that ``model`` would be given.
    """
    if model.bundle.classes != current.bundle.classes:
        return Agreement(skipped_reason="the classes are others"), []
    if _pixels_of(model) != _pixels_of(current):
        return Agreement(skipped_reason="photos are made into pixels in another way, and only pixels were kept"), []
    return recent.compare(current.bundle.version, model.engine, model.bundle.version)


def rejection_reason(
    current: LoadedModel, model: LoadedModel, agreement: Agreement, *, min_agreement: float, allow: Collection[str]
) -> Problem | None:
    """Why ``model`` should not follow ``current``: other classes, or fewer equal labels than the share ``min_agreement``."""
    if model.bundle.classes != current.bundle.classes and "classes" not in allow:
        return Problem(
            "bundle_incompatible",
            f"The bundle knows {_list(model)}, and the one that serves {_list(current)}, in this order; "
            'where that is meant, send "allow": ["classes"].',
        )
    if agreement.fraction < min_agreement and "disagreement" not in allow:
        return Problem(
            "bundle_incompatible",
            f"Of the last {agreement.compared} answered photos {agreement.agreed} get the same label from this bundle, "
            f'and {min_agreement:.0%} are wanted; where it is right, send "allow": ["disagreement"].',
        )
    return None


def _pixels_of(model: LoadedModel) -> tuple[object, ...]:
    """What decides over a photo's pixels; normalisation is a part of the graph."""
    seen = model.bundle.preprocessing
    return seen.input_px, seen.resize_px, seen.interpolation, seen.channels


def _list(model: LoadedModel) -> str:
    return ", ".join(model.bundle.classes)[:200]

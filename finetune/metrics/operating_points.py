"""Operating points: for each class the smallest minimum probability that keeps a precision, with 95% confidence.

An image that is predicted as a class with a lower probability gets no label. The thresholds that are tested leave out fixed
fractions of the predictions of the class. If a threshold is an order statistic of the predictions, those above it are a random
sample of all future predictions above it, so that the number of correct ones has a binomial distribution. Its lower confidence
bound (Clopper and Pearson 1934) is computed at a level that is divided by the number of thresholds (Bonferroni). With 95%
confidence, the bounds then hold at all thresholds at once. They therefore also hold at the one that is selected, for whichever
target, and for a target that is changed later.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from finetune.metrics.formatting import format_percent
from models.artifacts.statistics import wilson_interval
from models.errors import ConfigError, did_you_mean, list_names

LEVEL = 0.05
# Tested fractions of the predictions of a class that get no label: close together where few abstain
ABSTAINING = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
MAX_NEEDED = 100_000_000
MAX_SHOWN, MAX_NAMED = 10, 20
_ENTRY = re.compile(
    r"(?:^|,)(.+?=[^=,]*(?=,|$)|[^,]+)"
)  # of a list CLASS=X,...; a class name may contain commas and equals signs


@dataclass(frozen=True, eq=False)
class TopPredictions:
    """The most probable class of N images that were not used in training.

    Attributes:
        labels: True classes, (N,).
        predicted: Most probable classes, (N,).
        confidences: Their probabilities, (N,).
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidences: NDArray[np.float64]

    @classmethod
    def of(cls, labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> TopPredictions:
        """Take the most probable classes of probabilities (N, C)."""
        confidences = probabilities.max(axis=1).astype(np.float32)  # the type in which they are served
        return cls(labels, probabilities.argmax(axis=1).astype(np.int64), confidences.astype(np.float64))


@dataclass(frozen=True)
class Threshold:
    """A tested threshold of a class: ``correct`` of ``kept`` predictions with a probability of at least ``min_probability``.

    ``bound`` is the lower confidence bound of the precision.
    """

    min_probability: float
    kept: int
    correct: int
    bound: float


def bound_thresholds(confidences: NDArray[np.float64], correct: NDArray[np.bool_]) -> list[Threshold]:
    """Compute the bound of each tested threshold, from the lowest threshold, which keeps all predictions.

    Args:
        confidences: Probabilities of the predictions of one class, (n,).
        correct: Whether each prediction is correct, (n,).
    """
    order = np.argsort(-confidences, kind="stable")
    confidences, correct = confidences[order], correct[order]
    thresholds: list[Threshold] = []
    for fraction in ABSTAINING:
        kept = len(confidences) - math.floor(fraction * len(confidences))
        min_probability = 0.0
        if kept < len(confidences):
            highest_left_out = confidences[kept]
            kept = int((confidences > highest_left_out).sum())  # equal probabilities are left out together
            min_probability = float(np.nextafter(np.float32(highest_left_out), np.float32(1.0)))
        if kept and (not thresholds or kept < thresholds[-1].kept):
            right = int(correct[:kept].sum())
            thresholds.append(Threshold(min_probability, kept, right, _lower_bound(right, kept)))
    return thresholds


def operating_points(
    predictions: TopPredictions, targets: Mapping[str, float], *, classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Select the operating point of each class that has a target.

    Args:
        predictions: Predictions of images that were not used in training.
        targets: The target precision of each class.
        classes: The class names.

    Returns:
        For each class: its ``target``; the ``guaranteed`` precision, which is at least the target or else the highest that can
        be guaranteed; the ``min_probability``; ``kept`` of ``predicted`` predictions; their ``precision`` and the fraction that
        ``abstains``, with 95% Wilson intervals; and, if the target is not reached, how many predictions are ``needed`` (None if
        more of the same kind would not help).
    """
    points = {}
    for name, target in targets.items():
        own = predictions.predicted == classes.index(name)
        correct = predictions.labels[own] == predictions.predicted[own]
        points[name] = _select(bound_thresholds(predictions.confidences[own], correct), target, int(own.sum()))
    return points


def min_probabilities(points: Mapping[str, Any]) -> dict[str, float]:
    """Return the minimum probability of each class that has one, for the decision rule."""
    rows = points["classes"].items()
    return {name: point["min_probability"] for name, point in rows if point["min_probability"]}


def abstention(
    predictions: TopPredictions, points: Mapping[str, Mapping[str, Any]], *, classes: Sequence[str]
) -> dict[str, float]:
    """Compute the fraction of all images that get no label at these operating points, with its 95% Wilson interval."""
    lowest = np.array([points[name]["min_probability"] if name in points else 0.0 for name in classes])
    abstaining = int((predictions.confidences < lowest[predictions.predicted]).sum())
    return wilson_interval(abstaining, len(predictions.labels))


def parse_targets(text: str, classes: Sequence[str]) -> dict[str, float | None]:
    """Parse target precisions: one for all classes (``0.99``), or by class (``dogs=0.99,cats=none``). ``none`` becomes None.

    Raises:
        ConfigError: A class is unknown, or a number is not between 0 and 1.
    """
    if "=" not in text:
        return dict.fromkeys(classes, _parse_target(text, text))
    targets: dict[str, float | None] = {}
    for entry in _ENTRY.findall(text):
        name, _, number = (part.strip() for part in (entry.rpartition("=") if "=" in entry else (entry, "", "")))
        if name not in classes:
            raise ConfigError(
                f"--target-precision names {name!r}, which is not a class.{did_you_mean(name, classes)} "
                f"The classes are {list_names(classes, MAX_NAMED)}."
            )
        if name in targets:
            raise ConfigError(f"--target-precision names {name!r} twice. Remove one.")
        targets[name] = _parse_target(number, entry)
    return targets


def format_operating_points(points: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """Describe each operating point in a line, then the classes without one and the total.

    Beyond 10 classes only the ones are described that are furthest from their target.
    """
    rows: Mapping[str, Mapping[str, Any]] = points["classes"]
    names = list(rows)
    if len(names) > MAX_SHOWN:
        names = sorted(names, key=lambda name: (rows[name]["guaranteed"] or 0.0) - rows[name]["target"])[:MAX_SHOWN]
    lines = [f"{name}: {describe_operating_point(rows[name])}" for name in names]
    if len(names) < len(rows):
        lines.append(f"... and {len(rows) - len(names):,} more classes")
    if others := [name for name in classes if name not in rows]:
        lines.append(f"No threshold: {list_names(others, MAX_NAMED)}.")
    lines.append(f"In total {format_percent(points['abstains'])} of {points['photos']:,} photos are below a threshold.")
    if missed := [name for name in rows if not _is_reached(rows[name])]:
        lines.append(
            f"The target cannot be guaranteed for {list_names(missed, MAX_NAMED)}. A lower target gives more photos a label."
        )
    return lines


def describe_operating_point(point: Mapping[str, Any]) -> str:
    """Describe an operating point in a few sentences."""
    target, predicted = _percent(point["target"]), point["predicted"]
    if not predicted:
        return (
            f"a precision of {target} cannot be guaranteed, as no photo was predicted as this class (about {point['needed']:,} "
            "are needed). Every photo gets a label."
        )
    if _is_reached(point):
        text = f"a precision of at least {target} is guaranteed."
    else:
        lower = f"{math.floor(1000 * point['guaranteed']) / 10:.1f}%"
        needed = f"about {point['needed']:,} are needed" if point["needed"] else "more photos like these do not help"
        text = (
            f"a precision of {target} cannot be guaranteed with {predicted:,} photos predicted as this class ({needed}). "
            f"At least {lower} is guaranteed instead."
        )
    correct = round(point["precision"]["value"] * point["kept"])
    text = f"{text} Measured: {100 * point['precision']['value']:.1f}%, {correct:,} of {point['kept']:,}."
    if not point["min_probability"]:
        return f"{text} Every photo gets a label."
    return (
        f"{text} {format_percent(point['abstains'])} of the photos predicted as this class have a probability below "
        f"{point['min_probability']:.4f} and get no label."
    )


def _is_reached(point: Mapping[str, Any]) -> bool:
    return point["guaranteed"] is not None and bool(point["guaranteed"] >= point["target"])


def _parse_target(text: str, entry: str) -> float | None:
    if text == "none":
        return None
    try:
        target = float(text)
    except ValueError:
        target = math.nan
    if not 0 < target < 1:
        raise ConfigError(
            f"--target-precision must be X or CLASS=X,... with X between 0 and 1, or none (got {entry.strip()!r})."
        )
    return target


def _select(thresholds: Sequence[Threshold], target: float, predicted: int) -> dict[str, Any]:
    if not thresholds:
        return {
            "target": target,
            "guaranteed": None,
            "min_probability": 0.0,
            "kept": 0,
            "predicted": 0,
            "precision": None,
            "abstains": None,
            "needed": math.ceil(math.log(LEVEL / len(ABSTAINING)) / math.log(target)),
        }
    reached = [threshold for threshold in thresholds if threshold.bound >= target]
    best = reached[0] if reached else max(thresholds, key=lambda threshold: (threshold.bound, threshold.kept))
    return {
        "target": target,
        "guaranteed": best.bound,
        "min_probability": best.min_probability,
        "kept": best.kept,
        "predicted": predicted,
        "precision": wilson_interval(best.correct, best.kept),
        "abstains": wilson_interval(predicted - best.kept, predicted),
        "needed": None if reached else _needed(thresholds, target, predicted),
    }


def _needed(thresholds: Sequence[Threshold], target: float, predicted: int) -> int | None:
    """Estimate how many predictions reach the target at some threshold, if the precision there stays as it is."""
    factors = []
    for threshold in thresholds:
        low, high = 1.0, 2.0
        if threshold.correct <= target * threshold.kept:
            continue
        while _lower_bound(high * threshold.correct, high * threshold.kept) < target and high * predicted < MAX_NEEDED:
            low, high = high, 2 * high
        while (high - low) * predicted > 1:
            middle = (low + high) / 2
            reaches = _lower_bound(middle * threshold.correct, middle * threshold.kept) >= target
            low, high = (low, middle) if reaches else (middle, high)
        factors.append(high)
    return math.ceil(min(factors) * predicted) if factors else None


def _lower_bound(correct: float, total: float) -> float:
    """Compute the one-sided Clopper-Pearson bound at the level of one of several thresholds."""
    return float(betaincinv(correct, total - correct + 1, LEVEL / len(ABSTAINING))) if correct else 0.0


def _percent(fraction: float) -> str:
    return f"{round(100 * fraction, 3):g}%"

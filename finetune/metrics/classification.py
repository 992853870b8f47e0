"""How good a network is on photos it has not seen: numbers with intervals, ready for JSON and for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.bootstrap import bootstrap_mean_interval
from finetune.metrics.reliability import BINS, calibration_error
from finetune.metrics.roc import roc_auc
from models.artifacts.predictions import check_probabilities, confusion_counts, cross_entropy
from models.artifacts.statistics import wilson_interval

MANY_CLASSES = 10
WEAKEST_SHOWN = 5


def compute_metrics(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    *,
    classes: Sequence[str],
    uncalibrated: NDArray[np.float64] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Measure predictions of shape (N, C) against labels (N,), and say under ``methods`` how each number came about.

    Each measure is {"value", "low", "high"}, the ends at 95 %, or None with a sentence in ``notes`` where it is not
    defined. ``uncalibrated`` (N, C) are the probabilities before temperature scaling. The same ``seed`` gives the same
    numbers. Raises ValueError for shapes and values that do not fit together, and where there are no photos.
    """
    check_probabilities(labels, probabilities, len(classes))
    if not len(labels):
        raise ValueError("No photos arrived; at least one was wanted.")
    counts = confusion_counts(labels, probabilities.argmax(axis=1), len(classes))
    notes: list[str] = []
    metrics: dict[str, Any] = {
        "photos": len(labels),
        "classes": list(classes),
        "support": {name: int(n) for name, n in zip(classes, counts.sum(axis=1), strict=True)},
        "accuracy": wilson_interval(int(counts.trace()), len(labels)),
        **_by_probability(labels, probabilities, seed=seed, resamples=resamples),
        "roc_auc": _roc_auc(labels, probabilities, classes, notes, seed=seed, resamples=resamples),
    }
    if uncalibrated is not None:
        check_probabilities(labels, uncalibrated, len(classes))
        before = _by_probability(labels, uncalibrated, seed=seed, resamples=resamples)
        metrics |= {f"{name}_uncalibrated": measure for name, measure in before.items()}
    metrics["precision"] = _shares(counts, 0, classes, notes, "precision", "was predicted for no photo")
    metrics["recall"] = _shares(counts, 1, classes, notes, "recall", "has no photos")
    metrics |= {"confusion_matrix": counts.tolist(), "notes": notes, "methods": _methods(seed, resamples)}
    return metrics


def _by_probability(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], *, seed: int, resamples: int
) -> dict[str, dict[str, float]]:
    correct = probabilities.argmax(axis=1) == labels
    losses = cross_entropy(labels, probabilities)
    return {
        "log_loss": bootstrap_mean_interval(losses, seed=seed, resamples=resamples),
        "calibration_error": calibration_error(probabilities.max(axis=1), correct, seed=seed, resamples=resamples),
    }


def _roc_auc(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    classes: Sequence[str],
    notes: list[str],
    *,
    seed: int,
    resamples: int,
) -> dict[str, float] | None:
    if len(classes) < 2:
        notes.append("roc_auc is not defined: there is one class only.")
        return None
    absent = [name for index, name in enumerate(classes) if not (labels == index).any()]
    if absent:
        notes.append(f"roc_auc is not defined: no photos of {', '.join(map(repr, absent))}.")
        return None
    area = roc_auc(labels, probabilities, seed=seed, resamples=resamples)
    if area["low"] == 1.0:
        notes.append("roc_auc is 1 in every resample: its interval cannot show how uncertain a perfect ranking is.")
    return area


def _shares(
    counts: NDArray[np.int64], axis: int, classes: Sequence[str], notes: list[str], name: str, why: str
) -> dict[str, dict[str, float] | None]:
    """Precision (axis 0: of the photos predicted so) or recall (axis 1: of the photos that are so) of each class."""
    shares: dict[str, dict[str, float] | None] = {}
    for class_name, right, total in zip(classes, counts.diagonal(), counts.sum(axis=axis), strict=True):
        shares[class_name] = wilson_interval(int(right), int(total)) if total else None
        if not total:
            notes.append(f"{name} of {class_name!r} is not defined: the class {why}.")
    return shares


def _methods(seed: int, resamples: int) -> dict[str, str]:
    drawn = f"{resamples} resamples of the photos, seed {seed}"
    return {
        "accuracy": "Share of photos whose most probable class is the true one; 95 % Wilson score interval.",
        "precision": "Of the photos predicted as the class, the share that are it; 95 % Wilson score interval.",
        "recall": "Of the photos of the class, the share predicted as it; 95 % Wilson score interval.",
        "log_loss": f"Mean of -ln p(true class), p floored at 1e-12; 95 % percentile bootstrap, {drawn}.",
        "roc_auc": (
            "Area under the ROC curve: of the second class where there are two, else the mean of each class against "
            f"the rest; 95 % percentile bootstrap, {drawn}, drawn within each class."
        ),
        "calibration_error": (
            f"Expected calibration error of the most probable class: {BINS} bins of equal numbers of photos by "
            "confidence (equal confidences share a bin), the sum over bins of |right - sum of confidences| / photos. "
            "Chance alone makes it larger than 0, so the low end of the interval is 0 where a perfectly calibrated "
            "network would reach the value in over 2.5 % of simulations, else that of the basic bootstrap; the high "
            f"end is that of the percentile bootstrap; nominally 95 %, {drawn}, bins kept."
        ),
        "uncalibrated": "The same measures of the probabilities before temperature scaling.",
    }


def format_summary(metrics: Mapping[str, Any]) -> str:
    """A few plain lines for the end of a training, from the dict of ``compute_metrics``.

    Beyond 10 classes only the five weakest by recall are listed.
    """
    right = sum(row[i] for i, row in enumerate(metrics["confusion_matrix"]))
    before = "log_loss_uncalibrated" in metrics
    lines = [
        f"accuracy           {_percent(metrics['accuracy'], 2)}, {right:,} of {metrics['photos']:,} photos right",
        f"log loss           {_plain(metrics['log_loss'])}"
        + (f", before calibration {_plain(metrics['log_loss_uncalibrated'])}" if before else ""),
        f"ROC AUC            {_plain(metrics['roc_auc'])}",
        f"calibration error  {_percent(metrics['calibration_error'], 2)}"
        + (f", before calibration {_percent(metrics['calibration_error_uncalibrated'], 2)}" if before else ""),
        *_class_lines(metrics),
        *(f"note: {note}" for note in metrics["notes"]),
    ]
    return "\n".join(lines)


def _class_lines(metrics: Mapping[str, Any]) -> list[str]:
    names = list(metrics["classes"])
    heading = "class"
    if len(names) > MANY_CLASSES:
        measured = [name for name in names if metrics["recall"][name]]
        names = sorted(measured, key=lambda name: metrics["recall"][name]["value"])[:WEAKEST_SHOWN]
        heading = f"weakest {len(names)} of {len(metrics['classes'])}"
    width = max(len(heading), *(len(name) for name in names))
    rows = [f"{heading:<{width}}  {'precision':<28}  {'recall':<28}  photos"]
    for name in names:
        precision, recall = (_percent(metrics[measure][name]) for measure in ("precision", "recall"))
        rows.append(f"{name:<{width}}  {precision:<28}  {recall:<28}  {metrics['support'][name]:,}")
    return rows


def _percent(measure: Mapping[str, float] | None, digits: int = 1) -> str:
    if measure is None:
        return "not defined"
    value, low, high = (100.0 * measure[end] for end in ("value", "low", "high"))
    return f"{value:.{digits}f} % ({low:.1f} to {high:.1f} %)"


def _plain(measure: Mapping[str, float] | None) -> str:
    if measure is None:
        return "not defined"
    return f"{measure['value']:.4f} ({measure['low']:.4f} to {measure['high']:.4f})"

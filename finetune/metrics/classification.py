"""Classification metrics with 95% confidence intervals, as JSON-ready values and as a text summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.bootstrap import QUANTILES_95, bootstrap_mean_interval, resample_batches
from finetune.metrics.calibration import BINS, calibration_error
from finetune.metrics.formatting import format_percent
from models.artifacts.predictions import check_probabilities, confusion_counts, cross_entropy
from models.artifacts.statistics import confidence_interval, mean_of_proportions, wilson_interval
from models.errors import list_names

MANY_CLASSES = 10
TOP = 5
MIN_CLASSES_FOR_TOP = 10  # with fewer, a random order is often right
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
    """Compute the metrics of predictions with 95% intervals, reproducibly by ``seed``.

    Args:
        labels: True classes, (N,).
        probabilities: Predicted probabilities, (N, C).
        classes: The class names.
        uncalibrated: Probabilities before temperature scaling, (N, C).
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap resamples.

    Returns:
        The metrics. Each is {"value", "low", "high"}, or None with a sentence in ``notes`` if it is not defined.
        ``methods`` describes how each was computed.

    Raises:
        ValueError: There are no images, or the shapes or values do not match.
    """
    check_probabilities(labels, probabilities, len(classes))
    if not len(labels):
        raise ValueError("Expected at least one photo, got none.")
    counts = confusion_counts(labels, probabilities.argmax(axis=1), len(classes))
    notes: list[str] = []
    metrics: dict[str, Any] = {
        "photos": len(labels),
        "classes": list(classes),
        "support": {name: int(n) for name, n in zip(classes, counts.sum(axis=1), strict=True)},
        "accuracy": wilson_interval(int(counts.trace()), len(labels)),
        "balanced_accuracy": balanced_accuracy(counts),
        "macro_f1": macro_f1(counts, seed=seed, resamples=resamples),
        **_by_probability(labels, probabilities, seed=seed, resamples=resamples),
        "roc_auc": _roc_auc(labels, probabilities, classes, notes, seed=seed, resamples=resamples),
    }
    if len(classes) >= MIN_CLASSES_FOR_TOP:
        metrics["top_5_accuracy"] = wilson_interval(int(is_in_top(labels, probabilities).sum()), len(labels))
    if metrics["macro_f1"]["low"] == 1.0:
        notes.append("Macro F1 is 1.0 in every bootstrap sample, so its interval is not informative.")
    if uncalibrated is not None:
        check_probabilities(labels, uncalibrated, len(classes))
        before = _by_probability(labels, uncalibrated, seed=seed, resamples=resamples)
        metrics |= {f"{name}_uncalibrated": measure for name, measure in before.items()}
    metrics["precision"] = _per_class(counts, 0, classes, notes, "precision", "was never predicted")
    metrics["recall"] = _per_class(counts, 1, classes, notes, "recall", "has no photos")
    metrics |= {"confusion_matrix": counts.tolist(), "notes": notes, "methods": _methods(seed, resamples)}
    if "top_5_accuracy" not in metrics:
        del metrics["methods"]["top_5_accuracy"]
    return metrics


def balanced_accuracy(counts: NDArray[np.int64]) -> dict[str, float]:
    """Compute the mean recall of the classes that have images, with a 95% interval, from the confusion matrix (C, C)."""
    rows = [(int(correct), int(total)) for correct, total in zip(counts.diagonal(), counts.sum(axis=1), strict=True) if total]
    return mean_of_proportions(rows)


def macro_f1(counts: NDArray[np.int64], *, seed: int, resamples: int) -> dict[str, float]:
    """Compute the mean F1 score of the classes that are a label or a prediction of some image.

    The interval is that of the percentile bootstrap, stratified by class. As F1 depends on the confusion matrix only, each row
    of the matrix is resampled instead of its images.

    Args:
        counts: The confusion matrix, (C, C).
        seed: Seed of the bootstrap.
        resamples: Number of resamples.
    """
    support, predicted = counts.sum(axis=1), counts.sum(axis=0)
    occurs = (support + predicted) > 0
    value = float(np.mean(2 * counts.diagonal()[occurs] / (support + predicted)[occurs]))
    rng = np.random.default_rng(seed)
    true_positives = np.zeros((resamples, len(counts)))
    predictions = np.zeros((resamples, len(counts)))
    for label in np.flatnonzero(support):
        columns = np.flatnonzero(counts[label])
        drawn = rng.multinomial(support[label], counts[label, columns] / support[label], size=resamples)
        predictions[:, columns] += drawn
        true_positives[:, label] = drawn[:, columns == label].sum(axis=1)
    scores = 2 * true_positives[:, occurs] / np.maximum(support + predictions, 1)[:, occurs]
    low, high = np.quantile(scores.mean(axis=1), QUANTILES_95)
    return confidence_interval(value, low, high)


def is_in_top(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether the class of each image is among the 5 most probable ones: (N,). Of equal ones the first is higher."""
    own = probabilities[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(probabilities.shape[1]) < labels[:, None]
    higher = (probabilities > own) | ((probabilities == own) & earlier)
    return np.asarray(higher.sum(axis=1) < TOP)


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
        notes.append("roc_auc is not defined: there is only one class.")
        return None
    absent = [name for index, name in enumerate(classes) if not (labels == index).any()]
    if absent:
        notes.append(f"roc_auc is not defined: no photos of {list_names(map(repr, absent))}.")
        return None
    area = roc_auc(labels, probabilities, seed=seed, resamples=resamples)
    if area["low"] == 1.0:
        notes.append("ROC AUC is 1.0 in every bootstrap sample, so its interval is not informative.")
    return area


def roc_auc(labels: NDArray[np.int64], probabilities: NDArray[np.float64], *, seed: int, resamples: int) -> dict[str, float]:
    """Compute the ROC AUC of the second of two classes, or the mean of one class against the rest for more classes.

    The interval is that of the percentile bootstrap, stratified by class so that every resample contains all classes (the
    default of R's pROC).

    Args:
        labels: True classes, (N,). Every class needs an image.
        probabilities: Predicted probabilities, (N, C), with C at least 2.
        seed: Seed of the bootstrap.
        resamples: Number of resamples.
    """
    from sklearn.metrics import roc_auc_score  # imported here because it takes a second

    class_count = probabilities.shape[1]
    positives = [1] if class_count == 2 else list(range(class_count))
    value = np.mean([roc_auc_score(labels == k, probabilities[:, k]) for k in positives])
    members = [np.flatnonzero(labels == k) for k in range(class_count)]
    rng = np.random.default_rng(seed)
    areas = []
    for size in resample_batches(len(labels), resamples):
        counts = _stratified_counts(members, size, rng)
        areas.append(np.mean([weighted_roc_auc(labels == k, probabilities[:, k], counts) for k in positives], axis=0))
    low, high = np.quantile(np.concatenate(areas), QUANTILES_95)
    return confidence_interval(value, low, high)


def _stratified_counts(members: list[NDArray[np.intp]], size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Count how often each image is drawn in each of ``size`` resamples stratified by class: (N, size)."""
    num_images = sum(len(indices) for indices in members)
    drawn = np.concatenate([indices[rng.integers(len(indices), size=(len(indices), size))] for indices in members])
    cells = drawn * size + np.arange(size)
    return np.bincount(cells.ravel(), minlength=num_images * size).reshape(num_images, size).astype(np.float32)


def weighted_roc_auc(
    positive: NDArray[np.bool_], scores: NDArray[np.float64], weights: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Compute the ROC AUC for each column of weights: positive (N,), scores (N,), weights (N, R) -> (R,).

    The AUC is the fraction of positive-negative pairs in which the positive scores higher. A tie counts half.
    """
    negatives = np.flatnonzero(~positive)
    negatives = negatives[np.argsort(scores[negatives])]
    lower = np.searchsorted(scores[negatives], scores[positive], side="left")
    not_higher = np.searchsorted(scores[negatives], scores[positive], side="right")
    # The cumulative weight of the negatives is needed only at the positives' positions, so sum between those.
    edges = np.unique(np.concatenate([[0], lower, not_higher]))
    below = np.zeros((len(edges) + 1, weights.shape[1]))
    inner = edges[edges < len(negatives)]
    np.cumsum(np.add.reduceat(weights[negatives], inner, axis=0), axis=0, out=below[1 : len(inner) + 1])
    pairs_twice = weights[positive] * (below[np.searchsorted(edges, lower)] + below[np.searchsorted(edges, not_higher)])
    total = weights[positive].sum(axis=0) * below[len(inner)]
    return np.asarray(pairs_twice.sum(axis=0) / (2.0 * total), dtype=np.float64)


def _per_class(
    counts: NDArray[np.int64], axis: int, classes: Sequence[str], notes: list[str], name: str, reason: str
) -> dict[str, dict[str, float] | None]:
    """Compute the precision (axis 0) or recall (axis 1) of each class."""
    values: dict[str, dict[str, float] | None] = {}
    for class_name, correct, total in zip(classes, counts.diagonal(), counts.sum(axis=axis), strict=True):
        values[class_name] = wilson_interval(int(correct), int(total)) if total else None
    undefined = [repr(class_name) for class_name, value in values.items() if value is None]
    if len(undefined) == 1:
        notes.append(f"{name} of {undefined[0]} is not defined: the class {reason}.")
    elif undefined:
        notes.append(f"{name} is not defined for {len(undefined):,} classes: each {reason} ({list_names(undefined)}).")
    return values


def _methods(seed: int, resamples: int) -> dict[str, str]:
    bootstrap = f"{resamples} resamples of the photos, seed {seed}"
    return {
        "accuracy": "Fraction of photos whose most probable class is the true class. 95% Wilson score interval.",
        "balanced_accuracy": (
            "Mean recall of the classes. 95% interval from the Wilson score intervals of the recalls (method of variance "
            "estimates recovery)."
        ),
        "macro_f1": (
            "Mean over the classes of 2 * precision * recall / (precision + recall). "
            f"95% percentile bootstrap, {bootstrap}, stratified by class."
        ),
        "top_5_accuracy": (
            "Fraction of photos whose true class is among the five most probable ones. 95% Wilson score interval."
        ),
        "precision": "Fraction of photos predicted as the class that truly belong to it. 95% Wilson score interval.",
        "recall": "Fraction of photos of the class that are predicted as it. 95% Wilson score interval.",
        "log_loss": f"Mean of -ln p(true class), with p at least 1e-12. 95% bootstrap-t interval, {bootstrap}.",
        "roc_auc": (
            "Area under the ROC curve. With two classes that of the second, else the mean of one class against the rest. "
            f"95% percentile bootstrap, {bootstrap}, stratified by class."
        ),
        "calibration_error": (
            f"Expected calibration error of the most probable class: {BINS} bins with equal numbers of photos by "
            "confidence (equal confidences share a bin), the sum over bins of |correct - sum of confidences| / photos. "
            "Chance alone makes it larger than 0. The lower bound is therefore 0 if a perfectly calibrated network "
            "reaches the value in over 2.5% of simulations, else that of the basic bootstrap. The upper bound is that of the "
            f"percentile bootstrap. Nominally 95%, {bootstrap}, with fixed bins."
        ),
        "uncalibrated": "The same metrics of the probabilities before temperature scaling.",
    }


def format_summary(metrics: Mapping[str, Any]) -> str:
    """Format the result of ``compute_metrics`` as a short text. Beyond 10 classes it lists the five with the lowest recall."""
    correct = sum(row[i] for i, row in enumerate(metrics["confusion_matrix"]))

    def calibrated(name: str, text: Callable[[Any], str]) -> str:
        after, before = text(metrics[name]), text(metrics.get(f"{name}_uncalibrated", metrics[name]))
        return after if before == after else f"{after}, before calibration {before}"

    lines = [
        f"accuracy           {format_percent(metrics['accuracy'], 2)}, {correct:,} of {metrics['photos']:,} photos correct",
        *(f"{title:<17}  {text(metrics[name])}" for name, (title, text) in NEWER_METRICS.items() if name in metrics),
        f"log loss           {calibrated('log_loss', _decimal)}",
        f"ROC AUC            {_decimal(metrics['roc_auc'])}",
        f"calibration error  {calibrated('calibration_error', partial(format_percent, digits=2))}",
        *_class_lines(metrics),
        *(f"note: {note}" for note in metrics["notes"]),
    ]
    return "\n".join(lines)


def _class_lines(metrics: Mapping[str, Any]) -> list[str]:
    names = list(metrics["classes"])
    heading = "class"
    if len(names) > MANY_CLASSES:
        defined = [name for name in names if metrics["recall"][name]]
        names = sorted(defined, key=lambda name: metrics["recall"][name]["value"])[:WEAKEST_SHOWN]
        heading = f"lowest {len(names)} of {len(metrics['classes'])}"
    width = max(len(heading), *(len(name) for name in names))
    rows = [f"{heading:<{width}}  {'precision':<28}  {'recall':<28}  photos"]
    for name in names:
        precision, recall = (format_percent(metrics[measure][name]) for measure in ("precision", "recall"))
        rows.append(f"{name:<{width}}  {precision:<28}  {recall:<28}  {metrics['support'][name]:,}")
    return rows


def _decimal(measure: Mapping[str, float] | None) -> str:
    if measure is None:
        return "not defined"
    return f"{measure['value']:.4f} ({measure['low']:.4f} to {measure['high']:.4f})"


NEWER_METRICS: dict[str, tuple[str, Callable[[Any], str]]] = {  # which bundles of earlier versions do not have
    "balanced_accuracy": ("balanced accuracy", partial(format_percent, digits=2)),
    "macro_f1": ("macro F1", _decimal),
    "top_5_accuracy": ("top-5 accuracy", partial(format_percent, digits=2)),
}

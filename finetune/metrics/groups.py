"""Intervals for photos that come in groups, such as those of one patient, one camera or one burst.

Photos of a group resemble each other, so they contain less information than as many independent photos. The Wilson interval
and the bootstrap of photos are then too narrow. Here proportions have a Wilson interval with the effective number of photos,
and all other metrics a bootstrap that draws complete groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from finetune.metrics.bootstrap import QUANTILES_95, resample_batches
from finetune.metrics.calibration import BINS, equal_mass_bins
from finetune.metrics.classification import compute_metrics, is_in_top, weighted_roc_auc
from models.artifacts.predictions import cross_entropy
from models.artifacts.statistics import Z_95, confidence_interval, mean_of_proportions, wilson_interval

METHOD = (
    "The photos come in {groups:,} groups and are not independent within a group. Unlike stated for the single metrics, "
    "proportions have a 95% Wilson score interval with the effective number of photos (design effect of Rao and Scott 1992, "
    "Student's t for the number of groups), and other metrics a 95% percentile bootstrap of groups, {resamples} resamples, "
    "seed {seed}. Balanced accuracy has the wider of both."
)


def effective_size(correct: NDArray[np.bool_], groups: NDArray[np.int64]) -> float:
    """Return the number of independent photos that would estimate a proportion as precisely as photos in groups do.

    The number of photos is divided by the design effect: the variance of the proportion between groups, over that of
    independent photos (Rao and Scott 1992, https://doi.org/10.2307/2532311). If all photos are correct or all are incorrect,
    the variance between groups is unknown, and each group counts as one photo. With few groups the variance itself is
    uncertain, which Student's t corrects (Korn and Graubard 1998).

    Args:
        correct: Whether each photo counts towards the proportion, (N,).
        groups: The number of each photo's group, (N,).
    """
    _, rows, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    count, total = len(sizes), len(correct)
    if count == total:
        return float(total)
    if count == 1:
        return 1.0
    proportion = correct.mean()
    independent = proportion * (1 - proportion) / total
    residuals = np.bincount(rows, weights=correct - proportion)
    variance = count / (count - 1) * (residuals**2).sum() / total**2
    effective = total * independent / variance if variance > 0 else float(count) if independent == 0 else float(total)
    adjusted = effective * (Z_95 / stdtrit(count - 1, QUANTILES_95[1])) ** 2
    return float(np.clip(adjusted, 1.0, total))


def proportion_interval(correct: NDArray[np.bool_], groups: NDArray[np.int64] | None) -> dict[str, float]:
    """Compute a proportion with its 95% Wilson score interval, for (N,) photos in (N,) groups or independent ones."""
    if groups is None:
        return wilson_interval(int(correct.sum()), len(correct))
    return wilson_interval(*_effective_counts(correct, groups))


def _effective_counts(correct: NDArray[np.bool_], groups: NDArray[np.int64]) -> tuple[float, float]:
    """Return the effective numbers of correct photos and of all photos."""
    size = effective_size(correct, groups)
    return min(float(correct.mean()) * size, size), size


def compute_metrics_of_groups(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    *,
    classes: Sequence[str],
    groups: NDArray[np.int64] | None,
    uncalibrated: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the metrics of photos in groups, or of independent ones if ``groups`` is None. See ``compute_metrics``."""
    metrics = compute_metrics(labels, probabilities, classes=classes, uncalibrated=uncalibrated, seed=seed)
    if groups is None:
        return metrics
    return with_group_intervals(metrics, labels, probabilities, groups, uncalibrated=uncalibrated, seed=seed)


def with_group_intervals(
    metrics: Mapping[str, Any],
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    groups: NDArray[np.int64],
    *,
    uncalibrated: NDArray[np.float64] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Replace the intervals of metrics, which assume independent photos, by ones for photos in groups.

    Args:
        metrics: The result of ``compute_metrics`` for the same photos.
        labels: True classes, (N,).
        probabilities: Predicted probabilities, (N, C).
        groups: The number of each photo's group, (N,).
        uncalibrated: Probabilities before temperature scaling, (N, C).
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap resamples.

    Returns:
        The metrics with the same values, with the number of groups, and with ``methods`` that describe the intervals.
    """
    predicted = probabilities.argmax(axis=1)
    correct = predicted == labels
    _, rows = np.unique(groups, return_inverse=True)
    bootstrap = _GroupBootstrap(rows, seed=seed, resamples=resamples)
    new: dict[str, Any] = {"accuracy": proportion_interval(correct, rows)}
    for name, classes in (("precision", predicted), ("recall", labels)):
        new[name] = {
            class_: measure and proportion_interval(correct[classes == index], rows[classes == index])
            for index, (class_, measure) in enumerate(metrics[name].items())
        }
    for suffix, values in (("", probabilities), ("_uncalibrated", uncalibrated)):
        if values is not None:
            new[f"log_loss{suffix}"] = bootstrap.mean_interval(cross_entropy(labels, values))
            new[f"calibration_error{suffix}"] = bootstrap.calibration_error(values, labels)
    recalls = [_effective_counts(correct[labels == k], rows[labels == k]) for k in np.unique(labels)]
    new["balanced_accuracy"], new["macro_f1"] = bootstrap.class_means(labels, predicted, mean_of_proportions(recalls))
    if "top_5_accuracy" in metrics:
        new["top_5_accuracy"] = proportion_interval(is_in_top(labels, probabilities), rows)
    if metrics["roc_auc"]:
        new["roc_auc"] = bootstrap.roc_auc(labels, probabilities, metrics["roc_auc"]["value"])
    method = METHOD.format(groups=bootstrap.count, resamples=resamples, seed=seed)
    note = f"The intervals allow for {bootstrap.count:,} groups of photos."
    described = {"notes": [*metrics["notes"], note], "methods": {**metrics["methods"], "groups": method}}
    return {**metrics, **new, **described, "groups": bootstrap.count}


class _GroupBootstrap:
    """Resamples of complete groups, in batches that keep memory bounded."""

    def __init__(self, rows: NDArray[np.int64], *, seed: int, resamples: int) -> None:
        self._rows, self._seed, self._resamples = rows, seed, resamples
        self._sizes = np.bincount(rows)
        self.count = len(self._sizes)

    def mean_interval(self, values: NDArray[np.float64]) -> dict[str, float]:
        """Compute the mean of (N,) values with its interval."""
        low, high = np.quantile(self._means(values[:, None]), QUANTILES_95)
        return confidence_interval(values.mean(), low, high)

    def calibration_error(self, probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float]:
        """Compute the calibration error as ``finetune.metrics.calibration`` does.

        Its simulations of a perfectly calibrated network assume independent photos. Here the errors of each group get a random
        sign instead, which keeps the errors within a group together.
        """
        confidence = probabilities.max(axis=1)
        member = np.zeros((len(confidence), BINS))
        member[np.arange(len(confidence)), equal_mass_bins(confidence)] = 1.0
        gaps = member * ((probabilities.argmax(axis=1) == labels) - confidence)[:, None]
        value = np.abs(gaps.mean(axis=0)).sum()
        high = np.quantile(np.abs(self._means(gaps)).sum(axis=1), QUANTILES_95[1])
        rng = np.random.default_rng(self._seed)
        sums = self._sum_by_group(gaps)
        by_chance = [
            np.abs(rng.choice((-1.0, 1.0), size=(size, self.count)) @ sums / len(confidence)).sum(axis=1)
            for size in resample_batches(self.count, self._resamples)
        ]
        if value <= np.quantile(np.concatenate(by_chance), QUANTILES_95[1]):
            return confidence_interval(value, 0.0, high)
        return confidence_interval(value, max(0.0, 2.0 * value - high), high)

    def roc_auc(self, labels: NDArray[np.int64], probabilities: NDArray[np.float64], value: float) -> dict[str, float]:
        """Compute the interval of the ROC AUC. Resamples that lack a class are left out."""
        class_count = probabilities.shape[1]
        positives = [1] if class_count == 2 else list(range(class_count))
        areas = []
        with np.errstate(invalid="ignore"):
            for drawn in self._draw(len(labels)):
                weights = np.ascontiguousarray(drawn.T[self._rows], dtype=np.float32)
                areas.append(np.mean([weighted_roc_auc(labels == k, probabilities[:, k], weights) for k in positives], axis=0))
        defined = np.concatenate(areas)
        defined = defined[np.isfinite(defined)]
        low, high = np.quantile(defined, QUANTILES_95) if len(defined) else (0.0, 1.0)
        return confidence_interval(value, low, high)

    def class_means(
        self, labels: NDArray[np.int64], predicted: NDArray[np.int64], independent: dict[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Compute the balanced accuracy and the macro F1 score with their intervals.

        Args:
            labels: True classes, (N,).
            predicted: Predicted classes, (N,).
            independent: The balanced accuracy with the interval of independent classes. The result is at least as wide, as it
                has a width also without mistakes.
        """
        classes = np.union1d(labels, predicted)
        support, hits = labels[:, None] == classes, (labels == predicted)[:, None] & (labels[:, None] == classes)
        marks = support.astype(np.float64) + (predicted[:, None] == classes)
        sums = [self._sum_by_group(part.astype(np.float64)) for part in (hits, support, marks)]
        scores = []
        for drawn in self._draw(self.count):
            hit, own, marked = (drawn @ part for part in sums)
            recall = np.where(own > 0, hit / np.maximum(own, 1), np.nan)
            scores.append([np.nanmean(recall, axis=1), np.where(marked > 0, 2 * hit / np.maximum(marked, 1), 0).mean(axis=1)])
        (low, high), f1_bounds = (np.quantile(np.concatenate(parts), QUANTILES_95) for parts in zip(*scores, strict=True))
        balanced = independent["value"], min(low, independent["low"]), max(high, independent["high"])
        macro_f1 = float(np.mean(2 * hits.sum(axis=0) / marks.sum(axis=0)))
        return confidence_interval(*balanced), confidence_interval(macro_f1, *f1_bounds)

    def _means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the means of the resamples: (N, K) -> (resamples, K)."""
        sums = self._sum_by_group(values)
        return np.concatenate([drawn @ sums / (drawn @ self._sizes)[:, None] for drawn in self._draw(self.count)])

    def _sum_by_group(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([np.bincount(self._rows, weights=column) for column in values.T], axis=1)

    def _draw(self, width: int) -> Iterator[NDArray[np.float64]]:
        """Yield how often each group is drawn: (resamples of a batch, groups), batched for arrays of ``width`` columns."""
        rng = np.random.default_rng(self._seed)
        for size in resample_batches(width, self._resamples):
            yield rng.multinomial(self.count, np.full(self.count, 1 / self.count), size=size).astype(np.float64)

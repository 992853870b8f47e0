"""Area under the ROC curve with a bootstrap interval, fast enough for a thousand resamples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from finetune.metrics.bootstrap import QUANTILES_95, resample_batches
from models.artifacts.statistics import confidence_interval


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

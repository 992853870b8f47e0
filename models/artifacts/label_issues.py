"""Find probable label errors from out-of-fold predictions with confident learning.

Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels"
(https://arxiv.org/abs/1911.00068), as implemented in cleanlab. The probabilities of an image must come from a model that was
not trained on it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.artifacts.predictions import Predictions
from models.artifacts.statistics import wilson_interval


def can_judge_labels(confusion: NDArray[np.int64]) -> bool:
    """Return whether a model is good enough to question labels: its accuracy interval must lie above chance.

    Chance is the accuracy expected if predictions were independent of the labels, as in Cohen's kappa. A model that always
    predicts the most frequent class does not exceed it.

    Args:
        confusion: (C, C) counts; rows are labels and columns are predicted classes.
    """
    total = int(confusion.sum())
    if not total:
        return False
    chance = float(confusion.sum(axis=1) @ confusion.sum(axis=0)) / total**2
    return wilson_interval(int(np.trace(confusion)), total)["low"] > chance


def confusion_matrix(predictions: Predictions) -> NDArray[np.int64]:
    """Count the images by label (rows) and predicted class (columns): (C, C) int64."""
    size = len(predictions.classes)
    return np.bincount(predictions.labels * size + predictions.predicted, minlength=size**2).reshape(size, size)


def class_thresholds(predictions: Predictions) -> NDArray[np.float64]:
    """Compute each class's threshold: the mean probability of class j over the images labeled j.

    Returns:
        (C,) float64; infinity for a class without images.
    """
    thresholds = np.full(len(predictions.classes), np.inf)
    for j in range(len(thresholds)):
        self_confidence = predictions.probabilities[predictions.labels == j, j]
        if len(self_confidence):
            thresholds[j] = self_confidence.mean()
    return thresholds


def suggested_labels(predictions: Predictions) -> NDArray[np.int64]:
    """Suggest a label per image: the most probable class that reaches its threshold.

    Returns:
        (N,) class indices. An image without such a class keeps its label.
    """
    confident = np.where(predictions.probabilities >= class_thresholds(predictions), predictions.probabilities, -1.0)
    return np.where(confident.max(axis=1, initial=-1.0) < 0, predictions.labels, confident.argmax(axis=1)).astype(np.int64)


def find_label_issues(predictions: Predictions) -> NDArray[np.bool_]:
    """Flag probably mislabeled images, whose suggested label differs from their label.

    Returns:
        (N,) mask. No image is flagged if the model is too weak to judge labels (see ``can_judge_labels``).
    """
    if not can_judge_labels(confusion_matrix(predictions)):
        return np.zeros(len(predictions.labels), dtype=np.bool_)
    return np.asarray(suggested_labels(predictions) != predictions.labels)


def normalized_margins(predictions: Predictions) -> NDArray[np.float64]:
    """Compute the margin between the label's probability and the largest other one, scaled to 0..1.

    Returns:
        (N,) float64; lower means that the label is more likely to be wrong.
    """
    rows = np.arange(len(predictions.labels))
    others = predictions.probabilities.copy()
    others[rows, predictions.labels] = 0.0
    return np.asarray((predictions.probabilities[rows, predictions.labels] - others.max(axis=1, initial=0.0) + 1.0) / 2.0)


def rank_label_issues(predictions: Predictions) -> NDArray[np.intp]:
    """Return the rows of the probably mislabeled images, lowest margin first; ties keep their order."""
    rows = np.flatnonzero(find_label_issues(predictions))
    return rows[np.argsort(normalized_margins(predictions)[rows], kind="stable")]

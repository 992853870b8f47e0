"""Which labels are probably wrong, judged by out-of-fold predictions: confident learning.

Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels" (arXiv 1911.00068), as in
cleanlab. The probabilities have to come from networks that did not learn from the photo's own label.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.artifacts.predictions import Predictions


def class_thresholds(predictions: Predictions) -> NDArray[np.float64]:
    """(C,) the mean probability that photos labelled j get for j; infinite for a class without photos."""
    found = np.full(len(predictions.classes), np.inf)
    for j in range(len(found)):
        own = predictions.probabilities[predictions.labels == j, j]
        if len(own):
            found[j] = own.mean()
    return found


def suggested_labels(predictions: Predictions) -> NDArray[np.int64]:
    """(N,) the class that each photo probably is: the most probable of those that reach their class's threshold.

    A photo that reaches none keeps its label.
    """
    confident = np.where(predictions.probabilities >= class_thresholds(predictions), predictions.probabilities, -1.0)
    return np.where(confident.max(axis=1, initial=-1.0) < 0, predictions.labels, confident.argmax(axis=1)).astype(np.int64)


def find_label_issues(predictions: Predictions) -> NDArray[np.bool_]:
    """(N,) whether a photo is probably mislabelled: it is confidently of another class."""
    return np.asarray(suggested_labels(predictions) != predictions.labels)


def normalized_margins(predictions: Predictions) -> NDArray[np.float64]:
    """(N,) p(label) less the largest other probability, brought to 0..1: the lower, the less its label is believed."""
    rows = np.arange(len(predictions.labels))
    others = predictions.probabilities.copy()
    others[rows, predictions.labels] = 0.0
    return np.asarray((predictions.probabilities[rows, predictions.labels] - others.max(axis=1, initial=0.0) + 1.0) / 2.0)


def rank_label_issues(predictions: Predictions) -> NDArray[np.intp]:
    """The rows that are probably mislabelled, the least believed label first; equal ones in their own order."""
    rows = np.flatnonzero(find_label_issues(predictions))
    return rows[np.argsort(normalized_margins(predictions)[rows], kind="stable")]

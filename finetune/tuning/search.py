"""Cross-validate heads on cached features. The choice among them is cross-validated as well, so that its estimate is unbiased.

Each candidate is a network or a join with a normalization of its embeddings. In each outer fold its penalty is selected on the
other folds alone. The candidate that these inner folds prefer predicts the outer fold, and all of these predictions together
estimate what the choice is worth on new images. The best of many candidates would look better than it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from finetune.training.logistic_regression import (
    fit_logistic_regression,
    select_penalty,
    split_folds,
)
from finetune.training.scaled_embeddings import compact, scale_embeddings
from models.errors import DataError

OUTER_FOLDS = 5


@dataclass(frozen=True)
class Candidate:
    """A network, or a join, and how its embeddings are scaled for the logistic regression."""

    backbone: str
    normalization: str


@dataclass(frozen=True, eq=False)
class CrossValidated:
    """The out-of-fold results of a candidate.

    Attributes:
        candidate: The candidate.
        log_probs: Log-probabilities of images by heads that were fitted without them, (N, classes).
        inner_losses: The lowest loss of the inner folds in each outer fold, (folds,).
        penalty: The penalty that all images select.
    """

    candidate: Candidate
    log_probs: NDArray[np.float64]
    inner_losses: NDArray[np.float64]
    penalty: float

    def losses(self, labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the log loss of each image, (N,)."""
        return -np.asarray(self.log_probs[np.arange(len(labels)), labels])


@dataclass(frozen=True, eq=False)
class Search:
    """The cross-validated candidates, lowest loss first, and the log-probabilities of the cross-validated choice."""

    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    results: list[CrossValidated]
    selected_log_probs: NDArray[np.float64]


def search(
    embeddings: Mapping[str, NDArray[np.float32]],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    *,
    num_classes: int,
    normalizations: Sequence[str],
    seed: int,
    workers: int,
) -> Search:
    """Cross-validate every network with every normalization.

    Args:
        embeddings: The embeddings (N, d) of the same images by each network.
        labels: Class indices, (N,).
        groups: The number of each image's group, (N,).
        num_classes: The number of classes.
        normalizations: See ``scale_embeddings``.
        seed: Seed of the folds.
        workers: Number of threads.

    Raises:
        DataError: There are too few images.
    """
    splits = list(split_folds(labels, groups, folds=OUTER_FOLDS, seed=seed))
    if not splits:
        raise DataError("There are too few photos to compare heads: every class needs at least two, in two groups.")
    candidates = [Candidate(*pair) for pair in itertools.product(embeddings, normalizations)]

    def run(candidate: Candidate) -> CrossValidated:
        scaled = compact(scale_embeddings(embeddings[candidate.backbone], candidate.normalization)[0])
        log_probs = np.zeros((len(labels), num_classes))
        inner_losses = np.zeros(len(splits))
        for fold, (train, held_out) in enumerate(splits):
            selection = select_penalty(scaled[train], labels[train], groups[train], num_classes=num_classes, seed=seed)
            inner_losses[fold] = min(selection.losses.values(), default=np.inf)
            fit = fit_logistic_regression(scaled[train], labels[train], num_classes=num_classes, penalty=selection.penalty)
            log_probs[held_out] = fit.log_probs(scaled[held_out])
        penalty = select_penalty(scaled, labels, groups, num_classes=num_classes, seed=seed).penalty
        return CrossValidated(candidate, log_probs, inner_losses, penalty)

    with threadpool_limits(limits=1), ThreadPoolExecutor(workers) as pool:  # the candidates run in parallel, not their products
        results = list(pool.map(run, candidates))
    chosen = np.zeros((len(labels), num_classes))
    for fold, (_, held_out) in enumerate(splits):
        best = min(results, key=lambda result: float(result.inner_losses[fold]))
        chosen[held_out] = best.log_probs[held_out]
    results.sort(key=lambda result: float(result.losses(labels).mean()))
    return Search(labels, groups, results, chosen)

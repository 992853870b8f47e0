"""Multinomial logistic regression on scaled embeddings, with an L2 penalty that cross-validation selects.

The objective is the sum of the log losses plus ``penalty / 2`` times the sum of squared weights (``C = 1 / penalty`` in
scikit-learn). The bias has no penalty, so embeddings are centered for the optimizer, which then converges in fewer steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from finetune.training.scaled_embeddings import Floats, ScaledEmbeddings, compact, mean_embedding

PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(2, -9, -1))  # 10 to 0.0001
DEFAULT_PENALTY = 0.01
FOLDS = 5
PATIENCE = 2  # weaker penalties without a lower loss before the selection ends
MAX_IMAGES = 3_000  # sample for the selection of the penalty, which hardly depends on its size
SELECTION_TOLERANCE = 1e-6  # changes the loss in its sixth digit


@dataclass(frozen=True, eq=False)
class LogisticRegression:
    """The coefficients: ``weight`` (classes, d) and ``bias`` (classes,)."""

    weight: Floats
    bias: Floats

    def log_probs(self, embeddings: ScaledEmbeddings) -> Floats:
        """Compute the log-probabilities of embeddings, (N, classes)."""
        logits = [chunk @ self.weight.T + self.bias for _, chunk in embeddings.chunks()]
        return np.asarray(log_softmax(np.concatenate(logits), axis=1))


@dataclass(frozen=True)
class PenaltySelection:
    """The selected penalty, and the out-of-fold log loss of each penalty that was tried. Without folds there are none."""

    penalty: float
    losses: dict[float, float]


def fit_logistic_regression(
    embeddings: ScaledEmbeddings,
    labels: NDArray[np.int64],
    *,
    num_classes: int,
    penalty: float,
    weights: Floats | None = None,
    start: LogisticRegression | None = None,
    tolerance: float = 1e-8,
) -> LogisticRegression:
    """Fit the coefficients with L-BFGS until the gradient vanishes.

    Args:
        embeddings: N embeddings of d dimensions.
        labels: Class indices, (N,). Classes without images get a low probability.
        num_classes: The number of classes.
        penalty: The L2 penalty.
        weights: How much each image counts, (N,). None: the same.
        start: The coefficients to start from, such as those of a similar penalty.
        tolerance: The largest component of the gradient of the mean loss.
    """
    embeddings = embeddings.dense_if_small()
    count, dimensions = len(embeddings), embeddings.dimensions
    weights = np.ones(count) if weights is None else weights
    center = mean_embedding(embeddings)

    def objective(params: Floats) -> tuple[float, Floats]:
        weight, bias = params[:-num_classes].reshape(num_classes, dimensions), params[-num_classes:]
        loss = penalty / 2 * np.sum(weight**2)
        weight_gradient, bias_gradient = penalty * weight, np.zeros(num_classes)
        for rows, chunk in embeddings.chunks():
            own = np.arange(len(chunk)), labels[rows]
            log_probs = log_softmax(chunk @ weight.T + (bias - weight @ center), axis=1)
            loss -= weights[rows] @ log_probs[own]
            errors = np.exp(log_probs)
            errors[own] -= 1
            errors *= weights[rows, None]
            weight_gradient += errors.T @ chunk
            bias_gradient += errors.sum(axis=0)
        weight_gradient -= np.outer(bias_gradient, center)  # the embeddings are centered
        return float(loss / count), np.concatenate([weight_gradient.ravel(), bias_gradient]) / count

    first = np.zeros(num_classes * (dimensions + 1))
    if start is not None:
        first = np.concatenate([start.weight.ravel(), start.bias + start.weight @ center])
    options = {"maxiter": 5_000, "maxfun": 10_000, "maxcor": 20, "ftol": 1e-13, "gtol": tolerance}
    best = minimize(objective, first, jac=True, method="L-BFGS-B", options=options).x
    weight = best[:-num_classes].reshape(num_classes, dimensions)
    return LogisticRegression(weight, best[-num_classes:] - weight @ center)


def select_penalty(
    embeddings: ScaledEmbeddings,
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    *,
    num_classes: int,
    weights: Floats | None = None,
    seed: int,
    penalties: Sequence[float] = PENALTIES,
) -> PenaltySelection:
    """Select the strongest penalty whose out-of-fold log loss is at most one standard error above the lowest one.

    A wide range of weak penalties has almost the same loss in the folds, but the weakest ones give overconfident probabilities
    on other images. Source: the one-standard-error rule, Hastie, Tibshirani and Friedman 2009, section 7.10.

    Args:
        embeddings: N embeddings of d dimensions.
        labels: Class indices, (N,).
        groups: The number of each image's group, (N,). The images of a group share a fold.
        num_classes: The number of classes.
        weights: How much each image counts, (N,). None: the same.
        seed: Seed of the folds.
        penalties: The penalties to try, strongest first.
    """
    if len(labels) > MAX_IMAGES:
        kept = np.sort(np.random.default_rng(seed).choice(len(labels), MAX_IMAGES, replace=False))
        embeddings, labels, groups = embeddings[kept], labels[kept], groups[kept]
        weights = None if weights is None else weights[kept]
    embeddings = compact(embeddings).dense_if_small()
    weights = np.ones(len(labels)) if weights is None else weights
    splits = list(split_folds(labels, groups, folds=FOLDS, seed=seed))
    if not splits:
        return PenaltySelection(DEFAULT_PENALTY, {})
    fits: list[LogisticRegression | None] = [None] * len(splits)
    losses: dict[float, float] = {}
    errors: dict[float, float] = {}  # the standard error of each loss
    total = float(weights.sum())
    for penalty in penalties:
        image_losses = np.zeros(len(labels))
        for fold, (train, held_out) in enumerate(splits):
            fits[fold] = fit = fit_logistic_regression(
                embeddings[train],
                labels[train],
                num_classes=num_classes,
                penalty=penalty,
                weights=weights[train],
                start=fits[fold],
                tolerance=SELECTION_TOLERANCE,
            )
            log_probs = fit.log_probs(embeddings[held_out])
            image_losses[held_out] = -log_probs[np.arange(len(held_out)), labels[held_out]]
        losses[penalty] = loss = float(weights @ image_losses) / total
        errors[penalty] = float(np.linalg.norm(weights * (image_losses - loss))) / total
        best = min(losses, key=losses.__getitem__)
        if len(losses) - list(losses).index(best) > PATIENCE:
            break
    selected = next(penalty for penalty, loss in losses.items() if loss <= losses[best] + errors[best])
    return PenaltySelection(selected, losses)


def split_folds(
    labels: NDArray[np.int64], groups: NDArray[np.int64], *, folds: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the training rows and the held-out rows of each fold, stratified by class, with groups in one fold.

    There are fewer folds if a class has fewer images, and none if they cannot hold out images of each class.
    """
    counts = np.bincount(labels)
    numbers, sizes = np.unique(groups, return_counts=True)
    folds = min(folds, int(counts[counts > 0].min()), len(numbers))
    if folds < 2:
        return
    if sizes.max() > 1:
        splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(groups, labels, groups)
    else:  # much faster
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(groups, labels)
    yield from ((train, held_out) for train, held_out in splits if len(train) and len(held_out))

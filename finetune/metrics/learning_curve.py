"""Estimate what more training images would bring, from logistic heads that are fitted to parts of them.

In each fold, heads are fitted to random parts of the other folds and predict the fold. The error and the log loss fall about
as a power of the number of images (Hestness et al. 2017, https://arxiv.org/abs/1712.00409), which is continued to more images.
The interval contains the chance in the predicted images and in the choice of the parts (bootstrap), and how much the estimate
depends on a single point of the curve. It does not contain the chance of another law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.bootstrap import QUANTILES_95, bootstrap_means
from finetune.training.logistic_regression import (
    SELECTION_TOLERANCE,
    fit_logistic_regression,
    split_folds,
)
from finetune.training.scaled_embeddings import compact, scale_embeddings
from models.artifacts.statistics import confidence_interval

PARTS = (8, 4, 2, 1)  # a part is this fraction of a fold's training images
FOLDS, MAX_REPEATS, RESAMPLES = 5, 4, 2_000
REPEATED_IMAGES = 10_000  # fewer parts of each size are drawn of more images, as chance then matters less
MIN_IMAGES, MAX_IMAGES = 40, 20_000  # with more, the curve takes minutes
MEASURES = ("accuracy", "log_loss")


def learning_curve(
    embeddings: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    *,
    num_classes: int,
    penalty: float,
    normalization: str,
    seed: int,
) -> dict[str, Any] | None:
    """Measure accuracy and log loss by the number of training images, and estimate the gain by more of them.

    Args:
        embeddings: (N, d).
        labels: Class indices, (N,).
        groups: The number of each image's group, (N,).
        num_classes: The number of classes.
        penalty: The L2 penalty.
        normalization: See ``scale_embeddings``.
        seed: Seed of the folds, the parts and the bootstrap.

    Returns:
        The numbers of images and the measures with their intervals, and the gain by ``more_photos``. None if there are too
        few images, or too many.
    """
    splits = list(split_folds(labels, groups, folds=FOLDS, seed=seed))
    if not MIN_IMAGES <= len(labels) <= MAX_IMAGES or len(splits) < FOLDS:
        return None
    scaled = compact(scale_embeddings(embeddings, normalization)[0])
    rng = np.random.default_rng(seed)
    errors, losses = np.zeros((2, MAX_REPEATS, len(labels), len(PARTS)))
    for train, held_out in splits:
        rows, fit = np.arange(len(held_out)), None
        for column, part in enumerate(PARTS):
            for repeat in range(_repeats(part, len(labels))):
                own = rng.permutation(train)[: len(train) // part]
                fit = fit_logistic_regression(
                    scaled[own],
                    labels[own],
                    num_classes=num_classes,
                    penalty=penalty,
                    start=fit,  # saves steps
                    tolerance=SELECTION_TOLERANCE,
                )
                log_probs = fit.log_probs(scaled[held_out])
                errors[repeat, held_out, column] = log_probs.argmax(axis=1) != labels[held_out]
                losses[repeat, held_out, column] = -log_probs[rows, labels[held_out]]
    sizes = [int(len(splits[0][0]) // part) for part in PARTS]
    more = _round_number(len(labels) / 3)
    curve: dict[str, Any] = {"photos": sizes, "more_photos": more, "gain": {}}
    for name, values, sign in (("accuracy", errors, -1.0), ("log_loss", losses, 1.0)):
        average, means = _resampled_means(values, seed=seed)
        low, high = np.quantile(means, QUANTILES_95, axis=0)
        ends = [sorted((_shown(sign, a), _shown(sign, b))) for a, b in zip(low, high, strict=True)]
        curve[name] = [confidence_interval(_shown(sign, value), *pair) for value, pair in zip(average, ends, strict=True)]
        (gain,) = sign * _extrapolated_change(average[None], sizes, len(labels), more, count=len(labels))
        every = np.arange(len(PARTS))
        gains = [  # each resample lacks one point of the curve
            sign * _extrapolated_change(own[:, kept], np.array(sizes)[kept], len(labels), more, count=len(labels))
            for own, kept in zip(np.array_split(means, len(PARTS)), (np.delete(every, i) for i in every), strict=True)
        ]
        curve["gain"][name] = confidence_interval(gain, *np.quantile(np.concatenate(gains), QUANTILES_95))
    return curve


def _repeats(part: int, count: int) -> int:
    """Return how many parts of this size are drawn from ``count`` images."""
    return min(part, MAX_REPEATS, max(1, REPEATED_IMAGES // count))


def _resampled_means(values: NDArray[np.float64], *, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average (repeats, N, parts) over images and repeats: (parts,), and for resamples of both: (RESAMPLES, parts)."""
    rng = np.random.default_rng(seed)
    averages, resampled = [], []
    for column, part in enumerate(PARTS):
        own = values[: _repeats(part, values.shape[1]), :, column].T
        averages.append(own.mean())
        drawn = rng.multinomial(own.shape[1], np.full(own.shape[1], 1 / own.shape[1]), size=RESAMPLES) / own.shape[1]
        resampled.append((bootstrap_means(own, seed=seed, resamples=RESAMPLES) * drawn).sum(axis=1))
    return np.array(averages), np.stack(resampled, axis=1)


def format_learning_curve(curve: Mapping[str, Any]) -> str:
    """State the estimated gain in one sentence."""
    accuracy, loss = curve["gain"]["accuracy"], curve["gain"]["log_loss"]
    value, low, high = (100 * accuracy[end] for end in ("value", "low", "high"))
    return (
        f"{curve['more_photos']:,} more training photos would bring about {value:+.2f} points of accuracy (95% interval "
        f"{low:+.2f} to {high:+.2f}) and {loss['value']:+.4f} log loss ({loss['low']:+.4f} to {loss['high']:+.4f}), estimated "
        "from parts of the training photos."
    )


def _shown(sign: float, value: float) -> float:
    """Return the accuracy of an error, or the loss itself."""
    return float(1 - value) if sign < 0 else float(value)


def _extrapolated_change(
    means: NDArray[np.float64], sizes: Sequence[int] | NDArray[np.int64], now: int, more: int, *, count: int
) -> NDArray[np.float64]:
    """Fit ``a * size ** -b`` with b of at least 0 to each row (K, sizes), and return its change from ``now`` to ``now + more``.

    ``count`` images are behind each mean: half an image is added to an error of 0, which has no logarithm.
    """
    logs = np.log(np.maximum(means, 0.5 / count))
    x = np.log(sizes) - np.mean(np.log(sizes))
    slope = np.minimum(logs @ x / (x @ x), 0.0)
    at_now, at_more = (
        np.exp(logs.mean(axis=1) + slope * (math.log(size) - np.mean(np.log(sizes)))) for size in (now, now + more)
    )
    return np.asarray(at_more - at_now)


def _round_number(value: float) -> int:
    """Return the closest of 1, 2 and 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(value))
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda number: abs(math.log(number / value)))

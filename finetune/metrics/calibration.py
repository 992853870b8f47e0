"""Temperature scaling: calibrate a network's confidence with a single parameter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


def fit_temperature(log_probs: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> float:
    """Fit the temperature T with which softmax(log_probs / T) fits ``labels`` best, from 0.05 to 20.

    Minimizes the summed negative log likelihood (Guo et al. 2017, https://arxiv.org/abs/1706.04599) plus log(T)^2 / 2, a
    prior with about the weight of one image. If every prediction is correct, T is at least 1: without mistakes the data
    cannot show overconfidence, and the smallest T would fit best.

    Args:
        log_probs: Log-softmax outputs or logits of images unseen in training, (N, C).
        labels: Class indices, (N,).

    Raises:
        ValueError: The shapes do not match, a label is out of range, or a value is not finite.
    """
    scores = _check_scores(log_probs)
    if labels.shape != (len(scores),):
        raise ValueError(f"Expected log-probabilities (N, C) and labels (N,), got shapes {scores.shape} and {labels.shape}.")
    if len(labels) and not (labels.min() >= 0 and labels.max() < scores.shape[1]):
        raise ValueError(f"Labels range from {labels.min()} to {labels.max()}, but there are {scores.shape[1]} classes.")
    true = scores[np.arange(len(labels)), labels]

    def cost(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        loss = logsumexp(scores / temperature, axis=1).sum() - true.sum() / temperature
        return float(loss + 0.5 * log_temperature**2)

    lowest = 1.0 if (scores.argmax(axis=1) == labels).all() else MIN_TEMPERATURE
    best = minimize_scalar(cost, bounds=(math.log(lowest), math.log(MAX_TEMPERATURE)), method="bounded")
    return float(math.exp(best.x))


def apply_temperature(log_probs: NDArray[np.floating[Any]], temperature: float) -> NDArray[np.float64]:
    """Compute softmax(log_probs / temperature) of each row in float64: (N, C) -> (N, C).

    A temperature above 1 lowers the confidence, one below 1 raises it. The order of the classes does not change.

    Raises:
        ValueError: The temperature is not a positive number, or a value is not finite.
    """
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"The temperature must be a positive number (got {temperature}).")
    return np.asarray(softmax(_check_scores(log_probs) / temperature, axis=1), dtype=np.float64)


def _check_scores(log_probs: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    scores = np.asarray(log_probs, dtype=np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ValueError(
            f"Log-probabilities must be finite and of shape (N, C) (got shape {scores.shape}). "
            "Use log_softmax of the logits, since the log of a softmax can be -inf."
        )
    return scores

"""Temperature scaling: one number that makes a network's confidence match how often it is right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


def fit_temperature(log_probs: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> float:
    """The temperature T that makes softmax(log_probs / T) fit ``labels`` best, within 0.05 to 20.

    Takes log-softmax outputs or logits (N, C) and class indices (N,) of photos that training has not seen. Minimises
    the summed negative log likelihood (Guo et al. 2017, arXiv 1706.04599) plus log(T)^2 / 2, a prior that weighs about
    as much as one photo. Where every photo is right T is 1 at least: without a mistake nothing shows how sure is too
    sure, and the surest would fit best. Raises ValueError for shapes that do not fit, labels out of range and values
    that are not finite.
    """
    scores = _checked(log_probs)
    if labels.shape != (len(scores),):
        raise ValueError(f"Log-probabilities {scores.shape} came with labels {labels.shape}; (N, C) and (N,) wanted.")
    if len(labels) and not (labels.min() >= 0 and labels.max() < scores.shape[1]):
        raise ValueError(f"Labels run from {labels.min()} to {labels.max()}, but there are {scores.shape[1]} classes.")
    true = scores[np.arange(len(labels)), labels]

    def cost(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        loss = logsumexp(scores / temperature, axis=1).sum() - true.sum() / temperature
        return float(loss + 0.5 * log_temperature**2)

    lowest = 1.0 if (scores.argmax(axis=1) == labels).all() else MIN_TEMPERATURE
    best = minimize_scalar(cost, bounds=(math.log(lowest), math.log(MAX_TEMPERATURE)), method="bounded")
    return float(math.exp(best.x))


def apply_temperature(log_probs: NDArray[np.floating[Any]], temperature: float) -> NDArray[np.float64]:
    """softmax(log_probs / temperature) of each row, in float64: (N, C) -> (N, C).

    Above 1 the probabilities become less sure, below 1 surer; the order of the classes stays. Raises ValueError for a
    temperature that is not a positive number, and for values that are not finite.
    """
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"Temperature {temperature} arrived; a positive number was wanted.")
    return np.asarray(softmax(_checked(log_probs) / temperature, axis=1), dtype=np.float64)


def _checked(log_probs: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    scores = np.asarray(log_probs, dtype=np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ValueError(
            f"Log-probabilities of shape {scores.shape} arrived; finite values of shape (N, C) were wanted: "
            "take log_softmax of the logits, for the log of a softmax can be -inf."
        )
    return scores

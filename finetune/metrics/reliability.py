"""Whether a network that says 90 % is right nine times in ten: calibration bins, their error and its interval."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.bootstrap import QUANTILES_95, bootstrap_means, resample_batches
from models.artifacts.statistics import confidence_interval

BINS = 15


def equal_mass_bins(confidence: NDArray[np.float64], bins: int = BINS) -> NDArray[np.int64]:
    """Number photos by confidence into ``bins`` groups of as equal size as can be, 0 the least sure: (N,) -> (N,).

    Photos of equal confidence share a bin, so that the order of the photos does not matter; a bin can so stay empty.
    """
    rank = np.searchsorted(np.sort(confidence), confidence, side="left")
    return (rank * bins // len(confidence)).astype(np.int64)


def calibration_error(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], *, seed: int, resamples: int
) -> dict[str, float]:
    """The expected calibration error (ECE) of the top label over 15 equal-mass bins, with an interval.

    Takes (N,) confidences and whether each was right. The error is the sum over bins of |photos right - sum of
    confidences| / N (Naeini et al. 2015; equal mass as in Nguyen and O'Connor 2015).

    Chance alone lifts this error above 0, the more the fewer the photos, so that a plain percentile bootstrap misses a
    well-calibrated network. Here the low end is 0 where redrawn answers of a perfectly calibrated network
    (consistency resampling, Broecker and Smith 2007) reach this error in over 2.5 % of resamples; else it is the low
    end of the basic bootstrap, which takes that bias off once. The high end is the percentile bootstrap's. All keep
    the bins as they are. In simulations of 100 to 400 photos the interval held the true error 87 to 99 % of the time.
    """
    bins = equal_mass_bins(confidence)
    member = np.zeros((len(confidence), BINS))
    member[np.arange(len(confidence)), bins] = 1.0
    gaps = member * (correct - confidence)[:, None]
    value = np.abs(gaps.mean(axis=0)).sum()
    errors = np.abs(bootstrap_means(gaps, seed=seed, resamples=resamples)).sum(axis=1)
    percentile_high = np.quantile(errors, QUANTILES_95[1])
    if value <= np.quantile(_errors_by_chance(confidence, member, seed, resamples), QUANTILES_95[1]):
        return confidence_interval(value, 0.0, percentile_high)
    return confidence_interval(value, max(0.0, 2.0 * value - percentile_high), percentile_high)


def _errors_by_chance(
    confidence: NDArray[np.float64], member: NDArray[np.float64], seed: int, resamples: int
) -> NDArray[np.float64]:
    """The errors (resamples,) of a network that is right exactly as often as these confidences say."""
    rng = np.random.default_rng(seed)
    errors = []
    for size in resample_batches(len(confidence), resamples):
        right = rng.random((size, len(confidence))) < confidence
        errors.append(np.abs((right - confidence) @ member / len(confidence)).sum(axis=1))
    return np.concatenate(errors)

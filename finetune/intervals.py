"""95 % intervals for what is measured on a limited number of photos: Wilson's for proportions, bootstraps for means."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
QUANTILES_95 = (0.025, 0.975)
CELLS_AT_ONCE = 4_000_000  # photos x resamples that are in memory together: 32 MB for each array of them


def interval(value: float, low: float, high: float) -> dict[str, float]:
    """Value and ends as JSON-ready numbers; an end never crosses the value, not even by a rounding error."""
    return {"value": float(value), "low": float(min(low, value)), "high": float(max(high, value))}


def wilson(right: int, total: int) -> dict[str, float]:
    """The proportion right / total with its Wilson score interval (Wilson 1927; Newcombe 1998, method 3).

    Raises ValueError for a total below 1 and for a count that is not within 0..total.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} of {total} arrived; a count from 0 to a positive total was wanted.")
    share = right / total
    middle = share + Z_95**2 / (2 * total)
    half = Z_95 * math.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2))
    scale = 1 + Z_95**2 / total
    return interval(share, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def chunks(photos: int, resamples: int) -> Iterator[int]:
    """How many resamples to do at a time so that memory stays bounded; the sizes add up to ``resamples``."""
    size = max(1, CELLS_AT_ONCE // photos)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def resampled_means(values: NDArray[np.float64], *, seed: int, resamples: int) -> NDArray[np.float64]:
    """Means over photos drawn anew with replacement: (N, K) values -> (resamples, K), the same for the same seed."""
    rng = np.random.default_rng(seed)
    photos = len(values)
    means = []
    for size in chunks(photos, resamples):
        cells = rng.integers(photos, size=(size, photos)) + photos * np.arange(size)[:, None]
        counts = np.bincount(cells.ravel(), minlength=size * photos).reshape(size, photos)
        means.append(counts.astype(np.float64) @ values / photos)
    return np.concatenate(means)


def mean_interval(values: NDArray[np.float64], *, seed: int, resamples: int) -> dict[str, float]:
    """The mean of (N,) values with the interval of the percentile bootstrap (Efron 1979)."""
    means = resampled_means(values[:, None], seed=seed, resamples=resamples)
    low, high = np.quantile(means, QUANTILES_95)
    return interval(values.mean(), low, high)

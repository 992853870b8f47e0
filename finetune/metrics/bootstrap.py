"""Bootstrap 95% confidence intervals of means. Intervals of proportions are in ``models.artifacts.statistics``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from models.artifacts.statistics import confidence_interval

QUANTILES_95 = (0.025, 0.975)
MAX_CELLS = 4_000_000  # photos x resamples that are in memory together: 32 MB for each array of them


def resample_batches(num_images: int, resamples: int) -> Iterator[int]:
    """How many resamples to do at a time so that memory stays bounded; the sizes add up to ``resamples``."""
    size = max(1, MAX_CELLS // num_images)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def bootstrap_means(values: NDArray[np.float64], *, seed: int, resamples: int) -> NDArray[np.float64]:
    """Means over photos drawn anew with replacement: (N, K) values -> (resamples, K), the same for the same seed."""
    rng = np.random.default_rng(seed)
    num_images = len(values)
    means = []
    for size in resample_batches(num_images, resamples):
        cells = rng.integers(num_images, size=(size, num_images)) + num_images * np.arange(size)[:, None]
        counts = np.bincount(cells.ravel(), minlength=size * num_images).reshape(size, num_images)
        means.append(counts.astype(np.float64) @ values / num_images)
    return np.concatenate(means)


def bootstrap_mean_interval(values: NDArray[np.float64], *, seed: int, resamples: int) -> dict[str, float]:
    """The mean of (N,) values with the interval of the percentile bootstrap (Efron 1979)."""
    means = bootstrap_means(values[:, None], seed=seed, resamples=resamples)
    low, high = np.quantile(means, QUANTILES_95)
    return confidence_interval(values.mean(), low, high)

"""Bootstrap confidence intervals of means (95%). ``models.artifacts.statistics`` has those of proportions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from models.artifacts.statistics import confidence_interval

QUANTILES_95 = (0.025, 0.975)
MAX_CELLS = 4_000_000  # images x resamples in memory at once: 32 MB per array


def resample_batches(num_images: int, resamples: int) -> Iterator[int]:
    """Yield batch sizes that add up to ``resamples`` and keep memory bounded."""
    size = max(1, MAX_CELLS // num_images)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def bootstrap_means(values: NDArray[np.float64], *, seed: int, resamples: int) -> NDArray[np.float64]:
    """Compute the means of bootstrap resamples, reproducibly by ``seed``: (N, K) values -> (resamples, K)."""
    rng = np.random.default_rng(seed)
    num_images = len(values)
    means = []
    for size in resample_batches(num_images, resamples):
        cells = rng.integers(num_images, size=(size, num_images)) + num_images * np.arange(size)[:, None]
        counts = np.bincount(cells.ravel(), minlength=size * num_images).reshape(size, num_images)
        means.append(counts.astype(np.float64) @ values / num_images)
    return np.concatenate(means)


def bootstrap_mean_interval(values: NDArray[np.float64], *, seed: int, resamples: int) -> dict[str, float]:
    """Compute the mean of (N,) values with its 95% percentile bootstrap interval (Efron 1979)."""
    means = bootstrap_means(values[:, None], seed=seed, resamples=resamples)
    low, high = np.quantile(means, QUANTILES_95)
    return confidence_interval(values.mean(), low, high)

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
    """Compute the mean of (N,) values with its 95% bootstrap-t interval (Efron 1981, https://doi.org/10.2307/3314608).

    Few photos have most of the loss of an accurate network, and a sample often lacks the rarest ones. In simulations with 200
    to 1,400 images this interval contained the true mean 86% to 94% of the time, that of the percentile bootstrap 73% to 92%.
    """
    mean = values.mean()
    centered = values - mean
    means, squares = bootstrap_means(np.stack([centered, centered**2], axis=1), seed=seed, resamples=resamples).T
    deviations = np.sqrt(np.maximum(squares - means**2, 0.0))
    is_defined = deviations > 1e-9 * np.abs(centered).max(initial=0.0)
    if not is_defined.any():
        return confidence_interval(mean, mean, mean)
    low, high = mean - values.std() * np.quantile(means[is_defined] / deviations[is_defined], QUANTILES_95[::-1])
    return confidence_interval(mean, max(low, min(0.0, values.min())), high)

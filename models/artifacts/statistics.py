"""95% confidence intervals of proportions such as accuracy, and the comparison of two classifiers on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054


def confidence_interval(value: float, low: float, high: float) -> dict[str, float]:
    """Build a JSON-ready interval; rounding errors never put the value outside its bounds."""
    return {"value": float(value), "low": float(min(low, value)), "high": float(max(high, value))}


def wilson_interval(correct: float, total: float) -> dict[str, float]:
    """Compute the proportion correct / total with its Wilson score interval.

    Wilson 1927 (https://doi.org/10.1080/01621459.1927.10502953); Newcombe 1998, method 3. The counts of photos that are not
    independent are effective ones, which need not be whole numbers.

    Raises:
        ValueError: ``total`` is below 1, or ``correct`` is not within 0..total.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"Expected a count from 0 to a positive total, got {correct} of {total}.")
    proportion = correct / total
    center = proportion + Z_95**2 / (2 * total)
    half_width = Z_95 * math.sqrt(proportion * (1 - proportion) / total + Z_95**2 / (4 * total**2))
    scale = 1 + Z_95**2 / total
    return confidence_interval(proportion, max(0.0, (center - half_width) / scale), min(1.0, (center + half_width) / scale))


def mean_of_proportions(counts: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Compute the mean of independent proportions, such as the recalls of the classes, with a 95% interval.

    The Wilson intervals of the proportions are combined by the method of variance estimates recovery (Zou and Donner 2008,
    https://doi.org/10.1002/sim.3095). Unlike a bootstrap, the interval has a width even if every proportion is 0 or 1.

    Args:
        counts: The number of correct images and of all images, at least 1, for each proportion.
    """
    parts = [wilson_interval(correct, total) for correct, total in counts]
    mean = sum(part["value"] for part in parts) / len(parts)
    below, above = (math.sqrt(sum((part["value"] - part[end]) ** 2 for part in parts)) / len(parts) for end in ("low", "high"))
    return confidence_interval(mean, max(0.0, mean - below), min(1.0, mean + above))


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Compute the two-sided p value of McNemar's exact test for two classifiers on the same images.

    McNemar 1947 (https://doi.org/10.1007/BF02295996): if neither classifier is better, the images that only one of the two
    classifies correctly are split between them like fair coin tosses.

    Args:
        only_a: Number of images that only the first classifies correctly.
        only_b: Number of images that only the second classifies correctly.
    """
    total = only_a + only_b
    ways = tail = 1  # ways to choose 0, 1, 2, ... of the images
    for i in range(min(only_a, only_b)):
        ways = ways * (total - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)

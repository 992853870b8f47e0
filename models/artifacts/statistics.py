"""95% confidence intervals of proportions such as accuracy."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054


def confidence_interval(value: float, low: float, high: float) -> dict[str, float]:
    """Build a JSON-ready interval; rounding errors never put the value outside its bounds."""
    return {"value": float(value), "low": float(min(low, value)), "high": float(max(high, value))}


def wilson_interval(correct: int, total: int) -> dict[str, float]:
    """Compute the proportion correct / total with its Wilson score interval.

    Wilson 1927 (https://doi.org/10.1080/01621459.1927.10502953); Newcombe 1998, method 3.

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

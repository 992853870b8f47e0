"""The 95 % interval of a proportion: what a count of right answers on a limited number of photos can mean."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054


def confidence_interval(value: float, low: float, high: float) -> dict[str, float]:
    """Value and ends as JSON-ready numbers; an end never crosses the value, not even by a rounding error."""
    return {"value": float(value), "low": float(min(low, value)), "high": float(max(high, value))}


def wilson_interval(correct: int, total: int) -> dict[str, float]:
    """The proportion correct / total with its Wilson score interval (Wilson 1927; Newcombe 1998, method 3).

    Raises ValueError for a total below 1 and for a count that is not within 0..total.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"{correct} of {total} arrived; a count from 0 to a positive total was wanted.")
    share = correct / total
    middle = share + Z_95**2 / (2 * total)
    half = Z_95 * math.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2))
    scale = 1 + Z_95**2 / total
    return confidence_interval(share, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))

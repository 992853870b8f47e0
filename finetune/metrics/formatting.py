"""Format measures with their 95% intervals for the terminal and for reports."""

from __future__ import annotations

from collections.abc import Mapping


def format_percent(measure: Mapping[str, float] | None, digits: int = 1) -> str:
    """Format a proportion with its interval, such as ``91.56% (88.2 to 94.1%)``. ``digits`` are those of the proportion."""
    if measure is None:
        return "not defined"
    value, low, high = (100.0 * measure[end] for end in ("value", "low", "high"))
    return f"{value:.{digits}f}% ({low:.1f} to {high:.1f}%)"

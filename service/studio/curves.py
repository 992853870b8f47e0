"""Draw the curves of a training as SVG: a line for training, one for validation, and the interval of its accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 480, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 28
MAX_POINTS = 240
MAX_INTERVALS = 4  # of the y-axis
FRACTION_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25)


@dataclass(frozen=True)
class Curve:
    """A chart. Lines and the band are points for SVG; labels are positions and texts."""

    title: str
    train: str
    valid: str
    band: str
    last: tuple[float, float] | None
    y_labels: list[tuple[float, str]]
    x_labels: list[tuple[float, str]]
    summary: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def curve(title: str, rows: Sequence[Mapping[str, Any]], name: str, *, epochs: int) -> Curve:
    """Draw a measure over the epochs.

    Args:
        title: The title.
        rows: The events of the epochs.
        name: "loss" or "accuracy".
        epochs: Number of epochs of the complete training.
    """
    if len(rows) > MAX_POINTS:
        rows = [*rows[: -1 : -(-len(rows) // MAX_POINTS)], rows[-1]]
    low_name, high_name = f"valid_{name}_low", f"valid_{name}_high"
    names = (f"train_{name}", f"valid_{name}", low_name, high_name)
    values = [value for row in rows for key in names if (value := _value(row, key)) is not None]
    ticks = _ticks(*_bounds(values, is_fraction=name == "accuracy"), is_fraction=name == "accuracy")
    low, high = ticks[0], ticks[-1]
    done = int(rows[-1]["epoch"]) if rows else 0
    last_epoch = max(2, done, epochs if epochs <= 4 * done or not done else 2 * done)  # a short line stays readable

    def x(epoch: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / (last_epoch - 1), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low), 1)

    def line(key: str, part: Sequence[Mapping[str, Any]] = rows) -> str:
        values = ((row["epoch"], _value(row, key)) for row in part)
        return " ".join(f"{x(epoch)},{y(value)}" for epoch, value in values if value is not None)

    def label(value: float) -> str:
        return f"{value:.0%}" if name == "accuracy" else f"{value:g}"

    band = f"{line(high_name)} {line(low_name, rows[::-1])}".strip()
    last_value = _value(rows[-1], f"valid_{name}") if rows else None
    last = None if last_value is None else (x(done), y(last_value))
    steps = sorted({1, (last_epoch + 1) // 2, last_epoch})
    return Curve(
        title=title,
        train=line(f"train_{name}"),
        valid=line(f"valid_{name}"),
        band=band,
        last=last,
        y_labels=[(y(value), label(value)) for value in ticks],
        x_labels=[(x(epoch), str(epoch)) for epoch in steps],
        summary=_summary(title, rows, name),
    )


def _value(row: Mapping[str, Any], key: str) -> float | None:
    """Return a value of an epoch, or None if it has none, or one that cannot be drawn."""
    value = row.get(key)
    return float(value) if value is not None and math.isfinite(value) else None


def _bounds(values: Sequence[float], *, is_fraction: bool) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    margin = max((high - low) * 0.08, 0.01)
    low, high = (low - margin, high + margin)
    return (max(0.0, low), min(1.0, high)) if is_fraction else (max(0.0, low), high)


def _ticks(low: float, high: float, *, is_fraction: bool) -> list[float]:
    """Return multiples of a round step that enclose an interval, with at most MAX_INTERVALS between them."""
    exponent = math.floor(math.log10((high - low) / MAX_INTERVALS))
    steps = [factor * 10.0**power for power in (exponent, exponent + 1) for factor in (1, 2, 2.5, 5)]
    for step in FRACTION_STEPS if is_fraction else steps:
        first, last = math.floor(round(low / step, 9)), math.ceil(round(high / step, 9))
        if last - first <= MAX_INTERVALS:
            return [round(number * step, 12) for number in range(first, last + 1)]
    raise AssertionError("the largest step encloses every interval")


def _summary(title: str, rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Describe the chart for people who do not see it."""
    if not rows:
        return f"{title}: no epoch is finished yet."
    row = rows[-1]
    text = f"{title} after epoch {int(row['epoch'])}: "
    if name == "loss":
        return f"{text}training {row['train_loss']:.3f}, validation {row['valid_loss']:.3f}."
    return f"{text}training {row['train_accuracy']:.1%}, validation {row['valid_accuracy']:.1%}."

"""Draw the curves of a training as SVG: a line for training, one for validation, and the interval of its accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 480, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 28
MAX_POINTS = 240


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
    values = [float(row[key]) for row in rows for key in names if row.get(key) is not None]
    low, high = _bounds(values, is_fraction=name == "accuracy")
    done = int(rows[-1]["epoch"]) if rows else 0
    last_epoch = max(2, done, epochs if epochs <= 4 * done or not done else 2 * done)  # a short line stays readable

    def x(epoch: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / (last_epoch - 1), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low), 1)

    def line(key: str, part: Sequence[Mapping[str, Any]] = rows) -> str:
        return " ".join(f"{x(row['epoch'])},{y(float(row[key]))}" for row in part if row.get(key) is not None)

    def label(value: float) -> str:
        return f"{value:.0%}" if name == "accuracy" else f"{value:.2g}"

    band = f"{line(high_name)} {line(low_name, rows[::-1])}".strip()
    last = (x(rows[-1]["epoch"]), y(float(rows[-1][f"valid_{name}"]))) if rows else None
    steps = sorted({1, (last_epoch + 1) // 2, last_epoch})
    return Curve(
        title=title,
        train=line(f"train_{name}"),
        valid=line(f"valid_{name}"),
        band=band,
        last=last,
        y_labels=[(y(value), label(value)) for value in (low, (low + high) / 2, high)],
        x_labels=[(x(epoch), str(epoch)) for epoch in steps],
        summary=_summary(title, rows, name),
    )


def _bounds(values: Sequence[float], *, is_fraction: bool) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    margin = max((high - low) * 0.08, 0.01)
    low, high = (low - margin, high + margin)
    return (max(0.0, low), min(1.0, high)) if is_fraction else (max(0.0, low), high)


def _summary(title: str, rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Describe the chart for people who do not see it."""
    if not rows:
        return f"{title}: no epoch is finished yet."
    row = rows[-1]
    text = f"{title} after epoch {int(row['epoch'])}: "
    if name == "loss":
        return f"{text}training {row['train_loss']:.3f}, validation {row['valid_loss']:.3f}."
    return f"{text}training {row['train_accuracy']:.1%}, validation {row['valid_accuracy']:.1%}."

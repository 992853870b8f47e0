"""Accuracy by slice: for each value of the further columns of a table, such as each camera or hospital."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.formatting import format_percent
from finetune.metrics.groups import effective_size, proportion_interval
from finetune.metrics.significance import SIGNIFICANCE_LEVEL, holm_correction
from models.artifacts.facets import make_facets
from models.artifacts.predictions import Predictions

MAX_SHOWN = 10
METHOD = (
    "Accuracy of the photos with one value of a column. 95% Wilson score interval, with the effective number of photos if they "
    "come in groups. Sorted by the upper end of the interval, so that a small slice is not first by chance. p: Fisher's exact "
    "test against all other photos, on effective counts, with Holm's correction for the number of slices."
)


def compute_slices(predictions: Predictions) -> list[dict[str, Any]]:
    """Compute the accuracy of each slice, worst first.

    Returns:
        A row for each value of each column of ``predictions.facets``: column, value, photos, accuracy with its 95% interval,
        and p (None if the slice contains all photos).
    """
    correct, groups = predictions.correct, predictions.group_numbers
    rows: list[dict[str, Any]] = []
    for facet in make_facets(predictions.facets):
        values = np.array(facet.values)
        for value in facet.order:
            inside = np.asarray(values == value)
            own = groups[inside] if groups is not None else None
            rows.append(
                {
                    "column": facet.name,
                    "value": value,
                    "photos": int(inside.sum()),
                    "accuracy": proportion_interval(correct[inside], own),
                    "p": _difference_p_value(correct, inside, groups),
                }
            )
    tested = sorted((row for row in rows if row["p"] is not None), key=lambda row: row["p"])
    for row, p in zip(tested, holm_correction([row["p"] for row in tested]), strict=True):
        row["p"] = p
    return sorted(rows, key=lambda row: (row["accuracy"]["high"], row["accuracy"]["value"], -row["photos"]))


def _difference_p_value(
    correct: NDArray[np.bool_], inside: NDArray[np.bool_], groups: NDArray[np.int64] | None
) -> float | None:
    """Compute the p value of Fisher's exact test that the accuracy inside a slice is that of all other photos."""
    from scipy.stats import fisher_exact  # imported here because it takes a second

    if inside.all():
        return None
    table = []
    for part in (inside, ~inside):
        size = len(correct[part]) if groups is None else effective_size(correct[part], groups[part])
        hits = round(float(correct[part].mean()) * size)
        table.append([hits, round(size) - hits])
    return float(fisher_exact(table).pvalue)


def is_worse(row: Mapping[str, Any], accuracy: float) -> bool:
    """Return whether a slice is significantly less accurate than the other photos."""
    return row["p"] is not None and row["p"] < SIGNIFICANCE_LEVEL and row["accuracy"]["value"] < accuracy


def format_slices(metrics: Mapping[str, Any]) -> str:
    """Format the worst slices as a table, or an empty text if there are none."""
    slices = metrics.get("slices")
    if not slices:
        return ""
    shown = slices[:MAX_SHOWN]
    names = [f"{row['column']} = {row['value']}" for row in shown]
    width = max(len("worst slices"), *map(len, names))
    lines = [f"{'worst slices':<{width}}  {'accuracy':<28}  photos"]
    for name, row in zip(names, shown, strict=True):
        mark = f"  lower than the rest ({format_p(row['p'])})" if is_worse(row, metrics["accuracy"]["value"]) else ""
        lines.append(f"{name:<{width}}  {format_percent(row['accuracy']):<28}  {row['photos']:,}{mark}")
    if len(slices) > MAX_SHOWN:
        lines.append(f"... and {len(slices) - MAX_SHOWN:,} more slices in metrics.json")
    return "\n".join(lines)


def format_p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"

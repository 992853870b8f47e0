"""Compare a head that was trained without class weights with a balanced one on the same images, class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.formatting import format_percent
from finetune.metrics.significance import holm_correction
from finetune.metrics.slices import format_p
from models.artifacts.statistics import mcnemar_p_value, wilson_interval

PLAIN, BALANCED_HEAD = "plain", "balanced"
MAX_SHOWN = 10


def compare_heads(
    labels: NDArray[np.int64], plain: NDArray[np.int64], balanced: NDArray[np.int64], *, classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Compare the recall of each class between two heads.

    Args:
        labels: True classes, (N,).
        plain: Predictions of the head trained without weights, (N,).
        balanced: Predictions of the balanced head, (N,).
        classes: The class names.

    Returns:
        For each class with images: their number, the recall of both heads with 95% Wilson intervals, the images that only one
        of the heads classifies correctly, and the p value of McNemar's exact test, corrected for the number of classes (Holm).
    """
    rows: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(classes):
        own = labels == index
        if not own.any():
            continue
        a, b = plain[own] == index, balanced[own] == index
        only_plain, only_balanced = int((a & ~b).sum()), int((b & ~a).sum())
        rows[name] = {
            "photos": int(own.sum()),
            PLAIN: wilson_interval(int(a.sum()), len(a)),
            BALANCED_HEAD: wilson_interval(int(b.sum()), len(b)),
            "only_plain": only_plain,
            "only_balanced": only_balanced,
            "p": mcnemar_p_value(only_plain, only_balanced),
        }
    ordered = sorted(rows, key=lambda name: float(rows[name]["p"]))
    for name, p in zip(ordered, holm_correction([rows[name]["p"] for name in ordered]), strict=True):
        rows[name]["p"] = p
    return rows


def format_head_comparison(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the comparison as a table. Beyond 10 classes it lists the ones with the largest difference."""
    names = list(rows)
    if len(names) > MAX_SHOWN:
        names = sorted(names, key=lambda name: -abs(rows[name][BALANCED_HEAD]["value"] - rows[name][PLAIN]["value"]))[
            :MAX_SHOWN
        ]
    width = max(5, *(len(name) for name in names))
    lines = [f"{'class':<{width}}  {'recall, plain':<24}  {'recall, balanced':<24}  McNemar's test"]
    for name in names:
        row = rows[name]
        counts = f"only plain {row['only_plain']:,}, only balanced {row['only_balanced']:,}, {format_p(row['p'])}"
        lines.append(f"{name:<{width}}  {format_percent(row[PLAIN]):<24}  {format_percent(row[BALANCED_HEAD]):<24}  {counts}")
    return lines

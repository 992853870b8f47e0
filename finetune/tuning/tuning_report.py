"""Compare the cross-validated heads, choose the presets, and write tune.json, tune.csv and tune.md."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.bootstrap import bootstrap_mean_interval
from finetune.metrics.groups import proportion_interval
from finetune.metrics.significance import holm_correction, sign_flip_p_value
from finetune.metrics.slices import format_p
from finetune.tuning.networks import NetworkCost
from finetune.tuning.search import OUTER_FOLDS, Search
from models.artifacts.atomic_io import atomic_write_text
from models.artifacts.statistics import mcnemar_p_value
from models.artifacts.tuning_result import PRESETS, SELECTED_BY_PRESET, TUNING_FILE
from models.networks.spec import LOGISTIC

RESAMPLES = 10_000
COLUMNS = (
    "network",
    "normalization",
    "penalty",
    "accuracy (95% interval)",
    "log loss (95% interval)",
    "log loss above the best (95% interval)",
    "p",
    "ms per image",
    "graph, MB",
)


def describe_search(search: Search, costs: Mapping[str, NetworkCost], *, seed: int) -> dict[str, Any]:
    """Compare each candidate with the best one and choose the presets.

    Accuracies are compared by McNemar's exact test, or by random signs if images are in groups, corrected for the number of
    candidates (Holm). Log losses are compared by a bootstrap of their differences.

    Returns:
        The contents of tune.json, without the dataset.
    """
    labels = search.labels
    groups = search.groups if len(np.unique(search.groups)) < len(search.groups) else None
    best = search.results[0]
    best_correct, best_losses = best.log_probs.argmax(axis=1) == labels, best.losses(labels)
    rows: list[dict[str, Any]] = []
    for result in search.results:
        losses, correct = result.losses(labels), result.log_probs.argmax(axis=1) == labels
        row = {
            "backbone": result.candidate.backbone,
            "head": LOGISTIC,
            "normalization": result.candidate.normalization,
            "penalty": result.penalty,
            **_figures(correct, losses, groups, seed=seed),
            "log_loss_above_best": bootstrap_mean_interval(losses - best_losses, seed=seed, resamples=RESAMPLES),
            "p": None if result is best else _p_value(best_correct, correct, groups),
            "ms_per_image": costs[result.candidate.backbone].ms_per_image,
            "graph_mb": costs[result.candidate.backbone].graph_mb,
        }
        rows.append(row)
    compared = sorted((row for row in rows if row["p"] is not None), key=lambda row: float(row["p"]))
    for row, p in zip(compared, holm_correction([row["p"] for row in compared]), strict=True):
        row["p"] = p
    chosen_losses = -search.selected_log_probs[np.arange(len(labels)), labels]
    chosen_correct = search.selected_log_probs.argmax(axis=1) == labels
    return {
        "photos": len(labels),
        "folds": OUTER_FOLDS,
        "test": "a sign-flip test over groups" if groups is not None else "McNemar's exact test",
        "estimate": _figures(chosen_correct, chosen_losses, groups, seed=seed),
        "presets": choose_presets(rows),
        "candidates": rows,
    }


def choose_presets(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Choose the candidate with the lowest loss (best), the best of the fastest network (fast), and one in between (balanced).

    ``balanced`` is the fastest candidate whose loss is at most halfway between those of the other two.
    """
    best = min(rows, key=lambda row: float(row["log_loss"]["value"]))
    fast = min(rows, key=lambda row: (float(row["ms_per_image"]), float(row["log_loss"]["value"])))
    halfway = (best["log_loss"]["value"] + fast["log_loss"]["value"]) / 2
    near = [row for row in rows if row["log_loss"]["value"] <= halfway]
    balanced = min(near, key=lambda row: (float(row["ms_per_image"]), float(row["log_loss"]["value"])))
    chosen = dict(zip(PRESETS, (best, balanced, fast), strict=True))
    return {name: {setting: row[setting] for setting in SELECTED_BY_PRESET} for name, row in chosen.items()}


def write_tuning_report(out: Path, description: Mapping[str, Any], *, data: Path) -> str:
    """Write tune.json, tune.csv (all candidates) and tune.md (the best of each network) to ``out``. Returns the Markdown."""
    atomic_write_text(out / TUNING_FILE, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    atomic_write_text(out / "tune.csv", _csv(description["candidates"]))
    text = markdown(description, name=data.resolve().name)
    atomic_write_text(out / "tune.md", text)
    return text


def markdown(description: Mapping[str, Any], *, name: str) -> str:
    """Format the best candidate of each network, the estimate and the presets."""
    rows = description["candidates"]
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        first.setdefault(row["backbone"], row)
    table = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
    table += ["| " + " | ".join(_cells(row)) + " |" for row in first.values()]
    estimate, presets = description["estimate"], description["presets"]
    return "\n".join(
        [
            f"# Heads for {name}: {len(rows):,} candidates on {description['photos']:,} training photos\n",
            "\n".join(table) + "\n",
            f"The best candidate of each network, out of fold ({description['folds']} folds). p: {description['test']} of "
            "the accuracy against the first row, corrected for all candidates (Holm). Latency is that of the network alone in "
            "float32, one photo at a time on all CPUs.\n",
            "The first row was chosen because it looks best, so its figures are too good. Choosing by inner folds alone, and "
            f"predicting the others, gives an accuracy of {_percent(estimate['accuracy'])} and a log loss of "
            f"{_loss(estimate['log_loss'])}.\n",
            "## Presets\n",
            "\n".join(f"- {preset}: {_preset(row)}" for preset, row in presets.items()) + "\n",
        ]
    )


def _figures(
    correct: NDArray[np.bool_], losses: NDArray[np.float64], groups: NDArray[np.int64] | None, *, seed: int
) -> dict[str, Any]:
    return {
        "accuracy": proportion_interval(correct, groups),
        "log_loss": bootstrap_mean_interval(losses, seed=seed, resamples=RESAMPLES),
    }


def _p_value(best: NDArray[np.bool_], other: NDArray[np.bool_], groups: NDArray[np.int64] | None) -> float:
    if groups is not None:
        return sign_flip_p_value(best, other, groups)
    return mcnemar_p_value(int((best & ~other).sum()), int((other & ~best).sum()))


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["backbone"],
        row["normalization"],
        f"{row['penalty']:.3g}",
        _percent(row["accuracy"]),
        _loss(row["log_loss"]),
        "" if row["p"] is None else _loss(row["log_loss_above_best"]),
        "" if row["p"] is None else format_p(row["p"]),
        f"{row['ms_per_image']:.2f}",
        f"{row['graph_mb']:.1f}",
    ]


def _percent(interval: Mapping[str, float]) -> str:
    value, low, high = (100 * interval[end] for end in ("value", "low", "high"))
    return f"{value:.2f}% ({low:.1f} to {high:.1f}%)"


def _loss(interval: Mapping[str, float]) -> str:
    return "{value:.4f} ({low:.4f} to {high:.4f})".format(**interval)


def _preset(row: Mapping[str, Any]) -> str:
    return f"`--backbone {row['backbone']} --normalization {row['normalization']} --penalty {row['penalty']:.3g}`"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    flat = []
    for row in rows:
        cells: dict[str, Any] = {}
        for name, value in row.items():
            cells |= {f"{name}_{end}": value[end] for end in value} if isinstance(value, Mapping) else {name: value}
        flat.append(cells)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()

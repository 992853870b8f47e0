"""Write a comparison of networks as Markdown, CSV, JSON and a plot."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from finetune.compare.benchmark import ROUNDS, BenchmarkResult
from finetune.metrics.formatting import format_percent
from finetune.metrics.significance import PairwiseComparison, compare_pairs
from finetune.reports import plots
from models.artifacts.atomic_io import atomic_write_text

TEST = "McNemar's exact test on the photos that only one of the two gets right"
TEST_OF_GROUPS = "Test of the differences between the groups of the photos, with random signs"
COLUMNS = (
    "network",
    "accuracy (95% interval)",
    "balanced accuracy",
    "macro F1",
    "log loss",
    "ms per image",
    "precision",
    "graph, MB",
    "parameters",
    "training, s",
    "epochs",
)


def write_report(out: Path, rows: Sequence[BenchmarkResult], *, data: Path, skipped: Mapping[str, str]) -> str:
    """Write compare.md, compare.csv, compare.json and compare.png to ``out``.

    Args:
        out: The folder for the report.
        rows: The results, best first.
        data: The dataset.
        skipped: The networks that could not be trained, with the reasons.

    Returns:
        The Markdown text.
    """
    pairs = compare_pairs({row.backbone: row.correct for row in rows}, groups=rows[0].groups)
    text = markdown(rows, pairs, name=data.resolve().name, skipped=skipped)
    atomic_write_text(out / "compare.md", text)
    atomic_write_text(out / "compare.csv", _csv(rows))
    numbers = {
        "data": data.resolve().name,
        "photos": len(rows[0].correct),
        "networks": [_as_dict(row) for row in rows],
        "pairs": [{**dataclasses.asdict(pair), "is_significant": pair.is_significant} for pair in pairs],
        "skipped": dict(skipped),
    }
    atomic_write_text(out / "compare.json", json.dumps(numbers, indent=2, ensure_ascii=False) + "\n")
    with plots.report_style():
        plot_accuracy_over_latency(rows, out / "compare.png")
    return text


def markdown(
    rows: Sequence[BenchmarkResult], pairs: Sequence[PairwiseComparison], *, name: str, skipped: Mapping[str, str]
) -> str:
    """Format the table, the methods, the significant differences and the skipped networks as Markdown."""
    photos = len(rows[0].correct)
    table = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
    table += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    sections = [
        f"# Comparison on {name}: {photos:,} validation photos\n",
        "\n".join(table) + "\n",
        f"All networks were trained on the same photos and evaluated on the same {photos:,} validation photos, with the "
        "serving graph in the precision that the service selects on this machine. "
        f"{_selected_on_these_photos(rows)} Latency is that of the network alone, one photo at a time on all CPUs: the "
        f"median of {ROUNDS} interleaved rounds. Training time is that of the complete run, from reading the photos to the "
        "bundle, without features that were already cached. Networks marked * were trained from random weights.\n",
    ]
    if pairs:
        sections += [
            "## Significance of the differences\n",
            f"{TEST if rows[0].groups is None else TEST_OF_GROUPS}, corrected for the number of pairs (Holm). "
            "Significant: p < 0.05.\n",
            "\n".join(f"- {pair.text()}" for pair in pairs) + "\n",
        ]
    if skipped:
        sections += ["## Skipped\n", "\n".join(f"- {network}: {reason}" for network, reason in skipped.items()) + "\n"]
    return "\n".join(sections)


def _selected_on_these_photos(rows: Sequence[BenchmarkResult]) -> str:
    """State what was selected on the photos of the comparison. A logistic head has no epochs."""
    if all(row.epochs for row in rows):
        return "These photos also selected the best epoch and the calibration of each network."
    text = "These photos also selected the calibration of each network"
    return f"{text}, and the best epoch of networks trained in epochs." if any(row.epochs for row in rows) else f"{text}."


def plot_accuracy_over_latency(rows: Sequence[BenchmarkResult], path: Path) -> Path:
    """Plot accuracy with its interval against latency, with the names on the right connected to their points."""
    figure = Figure(figsize=(9, max(4.5, 0.42 * len(rows) + 2)), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        value, low, high = (100 * row.accuracy[end] for end in ("value", "low", "high"))
        color = plots.BLUE if row.pretrained else plots.ORANGE
        axes.errorbar(
            row.ms_per_image, value, yerr=[[value - low], [high - value]], fmt="o", color=color, capsize=3, markersize=6
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    label_heights = _spread([100 * row.accuracy["value"] for row in rows], low, high)
    for row, height in zip(rows, label_heights, strict=True):
        axes.annotate(
            f"{row.backbone}  {100 * row.accuracy['value']:.1f}%",
            xy=(row.ms_per_image, 100 * row.accuracy["value"]),
            xytext=(1.03, (height - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=plots.BLUE if row.pretrained else plots.ORANGE,
            arrowprops={"arrowstyle": "-", "color": plots.FAINT, "linewidth": 0.5},
            annotation_clip=False,
        )
    axes.set_ylim(low, high)
    axes.grid(axis="both")
    axes.set_axisbelow(True)
    title = f"Accuracy on {len(rows[0].correct):,} photos against latency\nblue: pretrained, orange: random initial weights"
    axes.set(xlabel="ms per photo (log scale)", ylabel="accuracy, % (bars: 95% interval)", title=title)
    return plots.save_png(figure, path)


def _spread(values: Sequence[float], low: float, high: float) -> list[float]:
    """Move descending ``values`` apart so that labels at these heights do not overlap, within the axis limits."""
    gap = (high - low) / max(18, len(values) + 1)
    heights: list[float] = []
    for value in values:
        heights.append(min(value, heights[-1] - gap) if heights else min(value, high - gap / 2))
    below_axis = low + gap / 2 - heights[-1]
    if below_axis > 0:
        heights[-1] += below_axis
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = max(heights[i], heights[i + 1] + gap)
    return heights


def _cells(row: BenchmarkResult) -> list[str]:
    return [
        row.backbone + ("" if row.pretrained else " *"),
        format_percent(row.accuracy, 2),
        format_percent(row.balanced_accuracy, 2),
        "{value:.3f} ({low:.3f} to {high:.3f})".format(**row.macro_f1),
        f"{row.log_loss['value']:.3f} ({row.log_loss['low']:.3f} to {row.log_loss['high']:.3f})",
        f"{row.ms_per_image:.2f}",
        row.precision,
        f"{row.graph_mb:.2f}",
        f"{row.parameters:,}",
        f"{row.training_s:.0f}",
        str(row.epochs) if row.epochs else "none",
    ]


def _csv(rows: Sequence[BenchmarkResult]) -> str:
    text = io.StringIO()
    flat = [
        {
            "network": row.backbone,
            "pretrained": row.pretrained,
            "precision": row.precision,
            **{
                f"{name}_{end}": getattr(row, name)[end]
                for name in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss")
                for end in ("value", "low", "high")
            },
            **{key: getattr(row, key) for key in ("ms_per_image", "graph_mb", "parameters", "training_s", "epochs")},
        }
        for row in rows
    ]
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _as_dict(row: BenchmarkResult) -> dict[str, Any]:
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name not in ("correct", "groups")}
    return {**values, "correct": int(np.count_nonzero(row.correct))}

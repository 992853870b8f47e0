"""A comparison as a table, as numbers for a program, as sentences and as one picture."""

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
from matplotlib.ticker import FuncFormatter

from finetune.compare.benchmark import ROUNDS, BenchmarkResult
from finetune.metrics.significance import PairwiseComparison, compare_pairs
from finetune.reports import plots
from models.artifacts.atomic_io import atomic_write_text

COLUMNS = (
    "network",
    "accuracy (95 % interval)",
    "log loss",
    "ms per image",
    "precision",
    "graph, MB",
    "parameters",
    "training, s",
    "epochs",
)


def write_report(out: Path, rows: Sequence[BenchmarkResult], *, data: Path, skipped: Mapping[str, str]) -> str:
    """Write compare.md, .csv, .json and .png into ``out``; returns the Markdown."""
    pairs = compare_pairs({row.backbone: row.correct for row in rows})
    text = markdown(rows, pairs, name=data.resolve().name, skipped=skipped)
    atomic_write_text(out / "compare.md", text)
    atomic_write_text(out / "compare.csv", _csv(rows))
    numbers = {
        "data": data.resolve().name,
        "photos": len(rows[0].correct),
        "networks": [_plain(row) for row in rows],
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
    """The table, how it was measured, and what is better than what."""
    photos = len(rows[0].correct)
    table = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
    table += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    parts = [
        f"# Comparison on {name}: {photos:,} validation photos\n",
        "\n".join(table) + "\n",
        f"All networks learned from the same photos and were measured on the same {photos:,} others, through the graph that is "
        "served, in the precision that the service would choose here. The best epoch and the calibration of each were "
        "chosen on these photos too. Milliseconds are those of the network alone, one photo at a time on all processors: the "
        f"median of {ROUNDS} rounds in which each took its turn. Training is the whole run, from the first look at the "
        "photos to the bundle; what was in the feature cache before is not counted. Networks marked * started from random "
        "weights.\n",
    ]
    if pairs:
        parts += [
            "## Which differences are real\n",
            "By McNemar's exact test on the photos that only one of two has right, corrected for the number of pairs (Holm); "
            "real is p < 0.05.\n",
            "\n".join(f"- {pair.text()}" for pair in pairs) + "\n",
        ]
    if skipped:
        parts += ["## Skipped\n", "\n".join(f"- {network}: {why}" for network, why in skipped.items()) + "\n"]
    return "\n".join(parts)


def plot_accuracy_over_latency(rows: Sequence[BenchmarkResult], path: Path) -> Path:
    """Accuracy, with its interval, against milliseconds a photo; the names stand beside, in order, tied to their points."""
    figure = Figure(figsize=(9, max(4.5, 0.42 * len(rows) + 2)), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        value, low, high = (100 * row.accuracy[end] for end in ("value", "low", "high"))
        color = plots.BLUE if row.pretrained else plots.ORANGE
        axes.errorbar(
            row.ms_per_image, value, yerr=[[value - low], [high - value]], fmt="o", color=color, capsize=3, markersize=6
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    low, high = axes.get_ylim()
    places = _spread([100 * row.accuracy["value"] for row in rows], low, high)
    for row, place in zip(rows, places, strict=True):
        axes.annotate(
            f"{row.backbone}  {100 * row.accuracy['value']:.1f} %",
            xy=(row.ms_per_image, 100 * row.accuracy["value"]),
            xytext=(1.03, (place - low) / (high - low)),
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
    title = f"Accuracy on {len(rows[0].correct):,} photos against time\nblue: pretrained, orange: trained from random weights"
    axes.set(xlabel="milliseconds a photo (log scale)", ylabel="accuracy, % (bars: 95 % interval)", title=title)
    return plots.save_png(figure, path)


def _spread(values: Sequence[float], low: float, high: float) -> list[float]:
    """Falling ``values``, moved apart so far that labels at their height do not touch, and kept within the axis."""
    gap = (high - low) / max(18, len(values) + 1)
    places: list[float] = []
    for value in values:
        places.append(min(value, places[-1] - gap) if places else min(value, high - gap / 2))
    under = low + gap / 2 - places[-1]
    if under > 0:
        places[-1] += under
        for i in range(len(places) - 2, -1, -1):
            places[i] = max(places[i], places[i + 1] + gap)
    return places


def _cells(row: BenchmarkResult) -> list[str]:
    value, low, high = (100 * row.accuracy[end] for end in ("value", "low", "high"))
    return [
        row.backbone + ("" if row.pretrained else " *"),
        f"{value:.2f} % ({low:.1f} to {high:.1f} %)",
        f"{row.log_loss['value']:.3f} ({row.log_loss['low']:.3f} to {row.log_loss['high']:.3f})",
        f"{row.ms_per_image:.2f}",
        row.precision,
        f"{row.graph_mb:.2f}",
        f"{row.parameters:,}",
        f"{row.training_s:.0f}",
        str(row.epochs),
    ]


def _csv(rows: Sequence[BenchmarkResult]) -> str:
    text = io.StringIO()
    flat = [
        {
            "network": row.backbone,
            "pretrained": row.pretrained,
            "precision": row.precision,
            **{f"accuracy_{end}": row.accuracy[end] for end in ("value", "low", "high")},
            **{f"log_loss_{end}": row.log_loss[end] for end in ("value", "low", "high")},
            **{key: getattr(row, key) for key in ("ms_per_image", "graph_mb", "parameters", "training_s", "epochs")},
        }
        for row in rows
    ]
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _plain(row: BenchmarkResult) -> dict[str, Any]:
    plain = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "correct"}
    return {**plain, "correct": int(np.count_nonzero(row.correct))}

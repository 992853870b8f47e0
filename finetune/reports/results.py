"""What an evaluation leaves, the same from a training and from a bundle: metrics, predictions, what looks alike, plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from finetune.metrics.classification import compute_metrics
from finetune.reports.figures import write_plots
from models.artifacts.atomic_io import atomic_write_text
from models.artifacts.predictions import Predictions
from models.artifacts.similarity import SimilarityIndex

METRICS, PREDICTIONS, PLOTS = "metrics.json", "predictions.csv", "plots"


def write_results(
    folder: Path,
    predictions: Predictions,
    *,
    similarity: SimilarityIndex,
    uncalibrated: NDArray[Any],
    temperature: float,
    data_dir: Path,
    history: Sequence[Mapping[str, float]] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Measure ``predictions`` and write all of it into ``folder``; returns the metrics."""
    metrics = compute_metrics(
        predictions.labels, predictions.probabilities, classes=predictions.classes, uncalibrated=uncalibrated, seed=seed
    )
    metrics["temperature"] = temperature
    folder.mkdir(parents=True, exist_ok=True)
    predictions.write_csv(folder / PREDICTIONS)
    similarity.write(folder)
    atomic_write_text(folder / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    write_plots(
        folder / PLOTS,
        predictions=predictions,
        data_dir=data_dir,
        history=history,
        uncalibrated=uncalibrated,
        seed=seed,
    )
    return metrics

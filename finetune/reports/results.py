"""Write the results of an evaluation: metrics, predictions, similarity files and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.io.progress import step
from finetune.metrics.abstention import METHOD as ABSTENTION_METHOD
from finetune.metrics.abstention import format_abstention, measure_abstention
from finetune.metrics.classification import format_summary
from finetune.metrics.groups import compute_metrics_of_groups
from finetune.metrics.learning_curve import format_learning_curve
from finetune.metrics.ood_detection import format_ood, measure_ood
from finetune.metrics.slices import METHOD as SLICES_METHOD
from finetune.metrics.slices import compute_slices, format_slices
from finetune.reports.plot_process import PlotProcess
from models.artifacts.atomic_io import atomic_write_text
from models.artifacts.decision_rule import DecisionRule
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
    rule: DecisionRule,
    neither_scores: Mapping[str, NDArray[np.float32]] | None = None,
    curve: Mapping[str, Any] | None = None,
    seed: int = 0,
    plots: PlotProcess | None = None,
) -> dict[str, Any]:
    """Compute the metrics of ``predictions`` and write all results to ``folder``.

    Args:
        folder: The folder for the results. It is created if missing.
        predictions: The calibrated predictions.
        similarity: Embeddings and near duplicates of the images.
        uncalibrated: Probabilities before temperature scaling, (N, C).
        temperature: The temperature that calibrated the predictions.
        data_dir: Folder of the images, for the image sheets.
        history: One row per epoch, for the learning curves.
        rule: When the model abstains.
        neither_scores: OOD scores of images of none of the classes, by their folder.
        curve: The result of ``learning_curve``, if there is one.
        seed: Seed of the bootstrap and of the random sheets.
        plots: Starts to draw the plots, so that the caller can continue. None: they are drawn when this returns.

    Returns:
        The metrics, as written to metrics.json.
    """
    with step("Computing the metrics"):
        metrics = compute_metrics_of_groups(
            predictions.labels,
            predictions.probabilities,
            classes=predictions.classes,
            groups=predictions.group_numbers,
            uncalibrated=uncalibrated,
            seed=seed,
        )
    if slices := compute_slices(predictions):
        metrics["slices"] = slices
        metrics["methods"]["slices"] = SLICES_METHOD
    metrics = with_decision(metrics | {"temperature": temperature}, predictions, rule)
    if predictions.ood_scores is not None and rule.max_ood_score is not None:
        metrics["ood"] = measure_ood(
            predictions.ood_scores,
            neither_scores or {},
            max_score=rule.max_ood_score,
            groups=predictions.group_numbers,
            seed=seed,
        )
    if curve:
        metrics["learning_curve"] = dict(curve)
    folder.mkdir(parents=True, exist_ok=True)
    predictions.write_csv(folder / PREDICTIONS)
    similarity.write(folder)
    atomic_write_text(folder / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    with PlotProcess() as own_plots, step("Drawing the plots"):
        (plots or own_plots).start(
            folder / PLOTS,
            predictions=predictions,
            data_dir=data_dir,
            history=history,
            uncalibrated=uncalibrated,
            max_ood_score=rule.max_ood_score,
            neither_scores=np.concatenate(list(neither_scores.values())) if neither_scores else None,
            curve=curve,
            seed=seed,
        )
        own_plots.wait()
    return metrics


def with_decision(metrics: Mapping[str, Any], predictions: Predictions, rule: DecisionRule) -> dict[str, Any]:
    """Return the metrics with what a decision rule does to the predictions, instead of any other rule."""
    measured = {name: value for name, value in metrics.items() if name != "decision"}
    measured["methods"] = {name: text for name, text in metrics["methods"].items() if name != "decision"}
    if decision := measure_abstention(predictions, rule):
        measured["decision"] = decision
        measured["methods"]["decision"] = ABSTENTION_METHOD
    return measured


def format_results(metrics: Mapping[str, Any]) -> str:
    """Format the result of ``write_results`` as a short text."""
    ood, decision, curve = (metrics.get(name) for name in ("ood", "decision", "learning_curve"))
    texts = [
        format_summary(metrics),
        format_slices(metrics),
        format_ood(ood) if ood else "",
        format_abstention(decision) if decision else "",
        format_learning_curve(curve) if curve else "",
    ]
    return "\n".join(filter(None, texts))

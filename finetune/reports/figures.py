"""Write all plots of an evaluation."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.reports import image_sheets, plots
from models.artifacts.predictions import Predictions, check_probabilities, confusion_counts

MAX_SHEET_CLASSES = 20
MAX_SLUG_LENGTH = 40


def write_plots(
    out_dir: Path,
    *,
    predictions: Predictions,
    data_dir: Path | None,
    history: Sequence[Mapping[str, float]] | None,
    uncalibrated: NDArray[np.float64] | None,
    max_ood_score: float | None = None,
    neither_scores: NDArray[np.float32] | None = None,
    curve: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write the plots of an evaluation as PNG files, each atomically.

    confusion_matrix.png, reliability.png and thresholds.png are always written, the others depend on the arguments.

    Args:
        out_dir: The folder for the plots.
        predictions: The evaluated predictions.
        data_dir: Folder of the images. If set, sheets of up to 12 images per class are written:
            confident_mistakes_<class>.png, least_certain_<class>.png and random_correct_<class>.png. Empty sheets are
            omitted, and beyond 20 classes only the 20 with the most mistakes get sheets.
        history: One mapping per epoch (epoch, train_loss, valid_loss, train_accuracy and valid_accuracy from 0 to 1,
            seconds). If set, learning_curves.png is written.
        uncalibrated: Probabilities before temperature scaling, (N, C).
        max_ood_score: The limit of the OOD score. If set, and the predictions have scores, ood_scores.png is written.
        neither_scores: OOD scores of images of none of the classes, (M,).
        curve: Accuracy and loss by the number of training images. If set, more_photos.png is written.
        seed: Seed of the bootstrap and of the random sheets.

    Returns:
        The paths of the written files.

    Raises:
        ValueError: There are no images, or the shapes do not match.
    """
    if not predictions.image_names:
        raise ValueError("Expected at least one photo, got none.")
    if uncalibrated is not None:
        check_probabilities(predictions.labels, uncalibrated, len(predictions.classes))
    classes = predictions.classes
    written = []
    with plots.report_style():
        if history:
            written.append(plots.plot_learning_curves(history, out_dir / "learning_curves.png"))
        if curve:
            written.append(plots.plot_more_photos(curve, out_dir / "more_photos.png"))
        counts = confusion_counts(predictions.labels, predictions.predicted, len(classes))
        written.append(plots.plot_confusion_matrix(counts, classes, out_dir / "confusion_matrix.png"))
        path = out_dir / "reliability.png"
        written.append(
            plots.plot_reliability_diagram(predictions.labels, predictions.probabilities, uncalibrated, path, seed=seed)
        )
        path = out_dir / "thresholds.png"
        written.append(plots.plot_thresholds(predictions.labels, predictions.probabilities, classes, path))
        if predictions.ood_scores is not None and max_ood_score is not None:
            path = out_dir / "ood_scores.png"
            written.append(plots.plot_ood_scores(predictions.ood_scores, neither_scores, max_ood_score, path))
        if data_dir is not None:
            names = slugs(classes)
            for label in _with_most_mistakes(counts):
                written += _write_sheets(out_dir, predictions, label, names[label], data_dir, seed=seed)
    return written


def _with_most_mistakes(counts: NDArray[np.int64]) -> list[int]:
    mistakes = counts.sum(axis=1) - counts.diagonal()
    return sorted(np.argsort(-mistakes, kind="stable")[:MAX_SHEET_CLASSES].tolist())


def _write_sheets(out_dir: Path, predictions: Predictions, label: int, slug: str, data_dir: Path, *, seed: int) -> list[Path]:
    photos_of = f"Photos of {plots.printable(predictions.classes[label], 30)}"
    mistakes = image_sheets.confident_mistakes(predictions, label)
    uncertain = image_sheets.least_certain(predictions, label)
    sample = image_sheets.random_correct(predictions, label, seed=seed)
    sheets = [
        ("confident_mistakes", mistakes, f"{photos_of}: mistakes,\nhighest loss first"),
        ("least_certain", uncertain, f"{photos_of}: least certain first\n(blue frame: correct, orange: incorrect)"),
        ("random_correct", sample, f"{photos_of}: correct,\nrandom sample"),
    ]
    return [
        image_sheets.image_sheet(predictions, indices, title, data_dir, out_dir / f"{kind}_{slug}.png")
        for kind, indices, title in sheets
        if len(indices)
    ]


def slugs(classes: Sequence[str]) -> tuple[str, ...]:
    """Return a file name component for each class: letters, digits, ``_``, ``-`` and inner ``.``, up to 40 characters.

    The components are unique, also ignoring case, and cannot leave a folder.
    """
    taken: set[str] = set()
    result = []
    for name in classes:
        plain = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", name))[:MAX_SLUG_LENGTH].strip(".-") or "class"
        slug, number = plain, 2
        while slug.casefold() in taken:
            slug, number = f"{plain}-{number}", number + 1
        taken.add(slug.casefold())
        result.append(slug)
    return tuple(result)

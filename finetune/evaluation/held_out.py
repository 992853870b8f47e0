"""Predictions and OOD scores of images that a model was not trained on, from which its decision rule is selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.fit_ood import OUT_OF_FOLD as OOD_OUT_OF_FOLD
from finetune.evaluation.trained_head import TrainedHead
from finetune.metrics.calibration import apply_temperature
from finetune.metrics.operating_points import LEVEL, TopPredictions, abstention, operating_points
from models.artifacts.atomic_io import atomic_write
from models.artifacts.bundle import HELD_OUT, Bundle, check_file
from models.artifacts.evaluation import BUNDLE_KIND, OUT_OF_FOLD, open_predictions
from models.artifacts.ood_score import OOD_SCORES_FILE, HeldOutOODScores
from models.errors import BundleError, ConfigError

VALIDATION = "validation"


@dataclass(frozen=True, eq=False)
class HeldOutPredictions:
    """The most probable class of each held-out image.

    Attributes:
        top: The predictions.
        source: "out-of-fold" (heads that were trained without the image), "evaluation" (other images) or "validation" (images
            that also selected the best epoch and the temperature).
        folds: Number of folds of out-of-fold predictions.
        ood_scores: (N,) OOD scores of the images, if they are known.
        groups: (N,) the number of the group of each image, if the images come in groups.
    """

    top: TopPredictions
    source: str
    folds: int | None = None
    ood_scores: NDArray[np.float32] | None = None
    groups: NDArray[np.int64] | None = None

    @property
    def ood_source(self) -> str:
        """What images the OOD scores are of, for the manifest."""
        return OOD_OUT_OF_FOLD if self.source == OUT_OF_FOLD else "an evaluation"

    def write(self, path: Path) -> None:
        """Write the predictions, 12 bytes per image before compression."""
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                labels=self.top.labels.astype(np.int32),
                predicted=self.top.predicted.astype(np.int32),
                confidences=self.top.confidences.astype(np.float32),
            )

    def manifest_fields(self, targets: Mapping[str, float], classes: Sequence[str]) -> dict[str, Any]:
        """Select the operating points for target precisions and describe them for the manifest."""
        points = operating_points(self.top, targets, classes=classes)
        return {
            "source": self.source,
            "folds": self.folds,
            "photos": len(self.top.labels),
            "confidence_level": 1 - LEVEL,
            "abstains": abstention(self.top, points, classes=classes),
            "classes": points,
        }


def held_out_predictions(head: TrainedHead) -> HeldOutPredictions:
    """Return the calibrated out-of-fold predictions of a trained head, or those of its validation images if it has none."""
    unseen = head.held_out or head.outputs
    probabilities = apply_temperature(unseen.log_probs + head.bias_shift, head.temperature)
    top = TopPredictions.of(unseen.labels, probabilities)
    return HeldOutPredictions(top, OUT_OF_FOLD, len(unseen.folds)) if unseen.folds else HeldOutPredictions(top, VALIDATION)


def read_held_out(bundle: Bundle) -> HeldOutPredictions:
    """Read the held-out predictions of a bundle.

    Raises:
        BundleError: The bundle has none, or the file was modified.
    """
    with np.load(_find_file(bundle, HELD_OUT, "out-of-fold predictions")) as arrays:
        top = TopPredictions(
            arrays["labels"].astype(np.int64), arrays["predicted"].astype(np.int64), arrays["confidences"].astype(np.float64)
        )
    points = bundle.manifest["operating_points"]
    return HeldOutPredictions(top, points["source"], points["folds"])


def read_ood_scores(bundle: Bundle) -> HeldOutOODScores:
    """Read the scores from which the limit of a bundle was chosen.

    Raises:
        BundleError: The bundle has none, or the file was modified.
    """
    return HeldOutOODScores.read(_find_file(bundle, OOD_SCORES_FILE, "OOD scores of photos that were not used in training"))


def read_evaluation(path: Path, bundle: Bundle) -> HeldOutPredictions:
    """Read the predictions of an evaluation folder of this bundle.

    Raises:
        BundleError: The folder is not an evaluation, or is one of another bundle.
        ConfigError: The evaluated images were used in training.
    """
    evaluation = open_predictions(path)
    versions = {bundle.version, bundle.merged_from, bundle.manifest.get("thresholds_from")}
    if evaluation.kind == BUNDLE_KIND or evaluation.bundle_version not in versions or evaluation.classes != bundle.classes:
        raise BundleError(f"{path} is not an evaluation of the bundle {bundle.path} (version {bundle.version}). Evaluate it.")
    if evaluation.kind != OUT_OF_FOLD and evaluation.split == "train":
        raise ConfigError(f"{path} has predictions of training photos, which look better than others. Evaluate other photos.")
    predictions = evaluation.predictions()
    top = TopPredictions.of(predictions.labels, predictions.probabilities)
    return HeldOutPredictions(top, evaluation.kind, evaluation.folds, predictions.ood_scores, predictions.group_numbers)


def _find_file(bundle: Bundle, name: str, contents: str) -> Path:
    """Return the path of a file of held-out results. Raises BundleError if the bundle lacks it, or if it was modified."""
    if name not in bundle.manifest["files"]:
        raise BundleError(
            f"The bundle {bundle.path} has no {contents}. Run `finetune evaluate {bundle.path} --folds 5 --data-dir DATA`, and "
            "pass its output folder with --evaluation."
        )
    check_file(bundle.path, name, bundle.manifest["files"])
    return bundle.path / name

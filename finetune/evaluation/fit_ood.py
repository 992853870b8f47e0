"""Fit the OOD score of a trained network to its training images, and its limit to images that it was not fit to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.duplicates import find_linked
from finetune.data.inspection import ImageRecord
from finetune.metrics.ood_detection import OODLimit, StackedRows, assign_groups_to_folds, fit_limit, fit_ood, out_of_fold_scores
from models.artifacts.data_folder import is_neither
from models.artifacts.ood_score import OODParameters

OUT_OF_FOLD, VALIDATION = "training and validation, out of fold", "validation"


@dataclass(frozen=True)
class OODFit:
    """A fitted score.

    Attributes:
        parameters: The parameters of the score.
        limit: The limit of the score.
        scores: The scores that gave the limit, (N,).
        groups: The number of the group of each of these images, (N,), if the images come in groups.
        source: The images whose scores gave the limit.
        images: Number of images that the parameters were fit to.
    """

    parameters: OODParameters
    limit: OODLimit
    scores: NDArray[np.float32]
    groups: NDArray[np.int64] | None
    source: str
    images: int

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest's field ``ood``, without measurements of the exported graph."""
        return {
            "method": "Mahalanobis distance of the embedding of unit length to the nearest class mean",
            "images": self.images,
            "dimensions": len(self.parameters.center),
            "components": self.parameters.num_components,
            "bytes": self.parameters.num_bytes,
            "limit": self.limit.as_dict() | {"source": self.source},
        }


def fit_records(
    train: Sequence[ImageRecord],
    valid: Sequence[ImageRecord],
    train_embeddings: NDArray[np.floating[Any]],
    valid_embeddings: NDArray[np.floating[Any]],
    *,
    is_frozen: bool,
    false_alarms: float,
    seed: int,
) -> OODFit | None:
    """Fit the score to the training images, and the limit to scores of images that it was not fit to.

    Args:
        train: The training images.
        valid: The validation images, if any are not among the training images.
        train_embeddings: (N, ...).
        valid_embeddings: (M, ...).
        is_frozen: Whether training did not change the layers before the embedding. If it did, training images have other
            embeddings than new images, so the limit comes from the validation images alone.
        false_alarms: The requested rate of false alarms.
        seed: Seed of the folds.

    Returns:
        The fit, or None if the images do not suffice.
    """
    labels = np.array([record.sample.label for record in (*train, *valid)], dtype=np.int64)
    parameters = fit_ood(train_embeddings, labels[: len(train)], seed=seed)
    if parameters is None:
        return None
    is_training = np.arange(len(labels)) < len(train)
    groups = find_linked([*train, *valid])
    scored = np.ones(len(labels), np.bool_)
    scores, source = None, OUT_OF_FOLD
    if is_frozen:
        embeddings = StackedRows(train_embeddings, valid_embeddings)
        folds = assign_groups_to_folds(groups, seed=seed)
        scores = out_of_fold_scores(embeddings, labels, folds, is_training=is_training, seed=seed)
    if scores is None and not len(valid):
        return None
    if scores is None:
        is_new = ~np.isin(groups[~is_training], groups[is_training])
        rows = is_new if is_new.any() else np.ones(len(valid), np.bool_)
        scored[is_training], scored[~is_training] = False, rows
        scores, source = parameters.scores(valid_embeddings[rows]), VALIDATION
    has_groups = any(record.sample.group for record in (*train, *valid))
    scored_groups = groups[scored] if has_groups else None
    limit = fit_limit(scores, false_alarms, sample=len(valid) or None, groups=scored_groups)
    return OODFit(parameters, limit, scores, scored_groups, source, len(train))


def neither_folder(image_name: str, label_table: Path | None) -> str:
    """Return the name of the folder ``none`` or ``neither``, or of the table, that an image of none of the classes is in."""
    if label_table:
        return label_table.name
    return next(str(folder) for folder in PurePosixPath(image_name).parents if is_neither(folder.name))

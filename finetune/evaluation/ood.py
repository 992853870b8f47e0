"""Fit the OOD score of a trained network to its training images, and its limit to images that it was not fit to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.duplicates import find_linked
from finetune.data.inspection import ImageRecord
from finetune.metrics.ood import OODLimit, assign_groups_to_folds, fit_limit, fit_ood, out_of_fold_scores
from models.artifacts.ood import OODParameters

OUT_OF_FOLD, VALIDATION = "training and validation, out of fold", "validation"


@dataclass(frozen=True)
class OODFit:
    """A fitted score.

    Attributes:
        parameters: The parameters of the score.
        limit: The limit of the score.
        source: The images whose scores gave the limit.
        images: Number of images that the parameters were fit to.
    """

    parameters: OODParameters
    limit: OODLimit
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
        valid: The validation images.
        train_embeddings: (N, ...).
        valid_embeddings: (M, ...).
        is_frozen: Whether training did not change the layers before the embedding. If it did, training images have other
            embeddings than new images, so the limit comes from the validation images alone.
        false_alarms: The requested rate of false alarms.
        seed: Seed of the folds.

    Returns:
        The fit, or None if the training images do not suffice.
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
        embeddings = np.concatenate([train_embeddings, valid_embeddings])
        folds = assign_groups_to_folds(groups, seed=seed)
        scores = out_of_fold_scores(embeddings, labels, folds, is_training=is_training, seed=seed)
    if scores is None:
        is_new = ~np.isin(groups[~is_training], groups[is_training])
        rows = is_new if is_new.any() else np.ones(len(valid), np.bool_)
        scored[is_training], scored[~is_training] = False, rows
        scores, source = parameters.scores(valid_embeddings[rows]), VALIDATION
    has_groups = any(record.sample.group for record in (*train, *valid))
    limit = fit_limit(scores, false_alarms, sample=len(valid), groups=groups[scored] if has_groups else None)
    return OODFit(parameters, limit, source, len(train))

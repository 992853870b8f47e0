"""Unequal classes: weights in the loss, balanced sampling, and the correction of the logits for both.

A head that is trained with weights predicts as if the classes had the weighted frequencies (a prior shift). Adding the negative
logarithm of each class's weight to its logit restores the frequencies of the training images (Saerens et al. 2002,
https://doi.org/10.1162/089976602753284446), if the head fits its training images perfectly. How much of it is added is
therefore fitted together with the temperature (``finetune.metrics.calibration``).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.config import BALANCED, NONE, TRAINING, Config
from finetune.training.data_loaders import balanced_draws
from models.errors import ConfigError, did_you_mean, list_names


@dataclass(frozen=True, eq=False)
class ClassBalance:
    """How much an image of each class counts in training.

    Attributes:
        loss_weights: Weight in the loss, (C,) float32, with a mean of 1 over the images of an epoch.
        effective_weights: Weight in the loss times draws per image and epoch, (C,) float64, with a mean of 1 over the training
            images.
        logit_shift: What the calibrated logits of a perfect fit need to have the frequencies where the model is used, (C,).
        frequencies: These frequencies, (C,).
    """

    loss_weights: Tensor
    effective_weights: NDArray[np.float64]
    logit_shift: NDArray[np.float64]
    frequencies: NDArray[np.float64]


def class_balance(config: Config, labels: Sequence[int], classes: Sequence[str]) -> ClassBalance | None:
    """Compute the weights of the classes from the settings and the training labels.

    Returns:
        The weights, or None if every image counts the same in training and where the model is used.
    """
    if config.class_weights == config.sampling == NONE and config.class_frequencies == TRAINING:
        return None
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=len(classes))
    draws = np.array(balanced_draws(counts.tolist()) if config.sampling == BALANCED else counts, dtype=np.float64)
    if config.class_weights == NONE:
        weights = np.ones(len(classes))
    elif config.class_weights == BALANCED:
        weights = 1.0 / np.maximum(counts, 1)
    else:
        weights = np.array([json.loads(config.class_weights)[name] for name in classes])
    weights = weights * draws.sum() / (draws @ weights)
    effective = np.ones(len(classes))
    np.divide(draws * weights, counts, out=effective, where=counts > 0)
    is_present = counts > 0
    frequencies = counts / counts.sum() if config.class_frequencies == TRAINING else is_present / is_present.sum()
    shift = np.zeros(len(classes))
    np.log(frequencies * counts.sum() / np.maximum(effective * counts, 1e-300), out=shift, where=is_present)
    return ClassBalance(torch.tensor(weights, dtype=torch.float32), effective, shift, frequencies)


def require_weights_of_classes(config: Config, classes: Sequence[str]) -> None:
    """Raise ConfigError unless the class weights, if there are any, name each class and no other."""
    if config.class_weights in (BALANCED, NONE):
        return
    weights = json.loads(config.class_weights)
    missing, unknown = sorted(set(classes) - set(weights)), sorted(set(weights) - set(classes))
    if unknown:
        problem = f"name {unknown[0]!r}, which is not a class.{did_you_mean(unknown[0], missing)}"
    elif missing:
        problem = f"have no weight for {missing[0]!r}."
    else:
        return
    raise ConfigError(f"The --class-weights {problem} Give each class one positive weight: {list_names(classes, 20)}.")


def read_class_weights(value: str) -> str:
    """Replace a file of class weights by its contents, so that the settings of a run contain them.

    Args:
        value: ``balanced``, ``none``, a file (a JSON object, or CSV rows of class and weight), or the contents as JSON.

    Returns:
        ``balanced``, ``none`` or a JSON object {class: weight}.

    Raises:
        ConfigError: The file cannot be read, or a weight is not a positive number.
    """
    if value in (BALANCED, NONE):
        return value
    origin, text = "--class-weights", value
    if not value.lstrip().startswith("{"):
        path = Path(value).expanduser()
        origin = str(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ConfigError(
                f"--class-weights must be {BALANCED}, {NONE} or a JSON or CSV file ({path}: {reason})."
                f"{did_you_mean(value, (BALANCED, NONE))}"
            ) from None
    rows = _parse_json(text, origin) if text.lstrip().startswith("{") else _parse_csv(text, origin)
    weights = {}
    for name, number in rows:
        weight = _positive(number)
        if weight is None:
            raise ConfigError(f"{origin}: the weight of {name!r} must be a positive number (got {number!r}).")
        if name in weights:
            raise ConfigError(f"{origin}: the class {name!r} has two weights. Remove one.")
        weights[name] = weight
    if not weights:
        raise ConfigError(f"{origin} contains no weights. Write one row per class, such as `dogs,20`.")
    return json.dumps(weights, ensure_ascii=False, sort_keys=True)


def _parse_json(text: str, origin: str) -> list[tuple[str, Any]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except ValueError as error:
        raise ConfigError(f"{origin} is not valid JSON ({error}). Write {{class: weight}}.") from None
    return [(str(name), weight) for name, weight in pairs]


def _parse_csv(text: str, origin: str) -> list[tuple[str, Any]]:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise ConfigError(f"{origin}, row {number}: expected a class and a weight, got {','.join(row)!r}.")
    has_header = bool(rows) and rows[0][1].strip().lower() == "weight"
    return [(name, weight) for name, weight in rows[has_header:]]


def _positive(number: Any) -> float | None:
    try:
        value = float(number)
    except (TypeError, ValueError):
        return None
    return value if not isinstance(number, bool) and 0 < value < math.inf else None

"""The options of an evaluation that exclude each other. This module does not import torch."""

from __future__ import annotations

from pathlib import Path

from models.errors import ConfigError


def require_compatible_options(
    *, split: str | None, folds: int | None, weights: str | Path | None, reviews: str | Path | None
) -> None:
    """Raise ConfigError for options that cannot be combined."""
    if folds is None and (weights or reviews):
        raise ConfigError("--weights and --reviews require --folds. Set the number of folds, or remove them.")
    if folds is not None and (folds < 2 or split):
        raise ConfigError("--folds must be at least 2, and cannot be combined with --split: it covers training and validation.")

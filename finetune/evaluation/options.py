"""The options of an evaluation that exclude each other. This module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.errors import ConfigError


def require_compatible_options(
    *, split: str | None, folds: int | None, weights: str | Path | None, neither: Sequence[str | Path] = ()
) -> None:
    """Raise ConfigError for options that cannot be combined."""
    if folds is None and weights:
        raise ConfigError("--weights requires --folds. Set the number of folds, or remove it.")
    if folds is not None and neither:
        raise ConfigError("--neither and --folds cannot be combined. Measure photos of none of the classes without --folds.")
    if folds is not None and (folds < 2 or split):
        raise ConfigError("--folds must be at least 2, and cannot be combined with --split: it covers training and validation.")

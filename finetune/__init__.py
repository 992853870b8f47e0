"""Train image classifiers on folders of photos, evaluate them and predict with them. Importing this package is fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.api import Classifier, Evaluation, Prediction, evaluate, load, train

__all__ = ["Classifier", "Evaluation", "Prediction", "evaluate", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import the Python interface, and with it PyTorch, when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from finetune import api

    return getattr(api, name)

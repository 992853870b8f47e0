"""Report each epoch as an event (``finetune.io.progress``): losses, accuracy with its interval, and changed predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from finetune.data.inspection import ImageRecord
from finetune.io.progress import report
from finetune.training.trainer import Progress
from models.artifacts.statistics import wilson_interval
from models.networks.spec import LINEAR

MAX_CHANGED = 24  # listed in an event; all are counted


class EpochReporter:
    """Reports the epochs of a run.

    Args:
        epochs: Number of epochs of the run.
        train_images: Number of training images.
        valid: The validation images, in the order of ``Progress.valid_predicted``.
        classes: The class names.
        head: How the last layer is trained. The logistic one has no epochs, and reports its result as one.
        is_weighted: Whether the accuracy is weighted by class, so that it has no interval of counts.
        saved: The state that the run is resumed from.
    """

    def __init__(
        self,
        *,
        epochs: int,
        train_images: int,
        valid: Sequence[ImageRecord],
        classes: Sequence[str],
        head: str = LINEAR,
        is_weighted: bool = False,
        saved: Progress | None = None,
    ) -> None:
        self._epochs, self._train_images, self._valid, self._classes = epochs, train_images, valid, classes
        self._is_weighted = is_weighted
        self._previous: Tensor | None = saved.valid_predicted if saved else None
        report("training", head=head, epochs=epochs, epoch=saved.epoch if saved else 0, train=train_images, valid=len(valid))

    def report(self, progress: Progress) -> None:
        """Report the last epoch of ``progress``."""
        row, predicted = progress.history[-1], progress.valid_predicted
        values: dict[str, Any] = {**row, "epochs": self._epochs, "best_epoch": progress.best_epoch}
        values["images_per_second"] = self._train_images / row["seconds"] if row["seconds"] else None
        if not self._is_weighted:
            interval = wilson_interval(row["valid_accuracy"] * len(self._valid), len(self._valid))
            values["valid_accuracy_low"], values["valid_accuracy_high"] = interval["low"], interval["high"]
        if predicted is not None and self._previous is not None:
            changed = (predicted != self._previous).nonzero().flatten().tolist()
            values["changed_count"] = len(changed)
            values["changed"] = [self._change(i, int(self._previous[i]), int(predicted[i])) for i in changed[:MAX_CHANGED]]
        self._previous = predicted
        report("epoch", **values)

    def _change(self, i: int, before: int, now: int) -> dict[str, str]:
        record = self._valid[i]
        return {
            "photo": record.sample.name,
            "sha256": record.sha256,
            "label": self._classes[record.sample.label],
            "before": self._classes[before],
            "now": self._classes[now],
        }

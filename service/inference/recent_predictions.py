"""The last predicted images as preprocessed pixels, on which a new bundle is compared with the current one.

They are bounded and in memory only. Files and their names are not kept, and nothing is written or shown.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.artifacts.decision_rule import DecisionRule
from models.runtime.openvino_engine import Engine, Pixels


@dataclass(frozen=True)
class Agreement:
    """How far two models agree: ``agreed`` of ``compared`` images got the same label.

    If both models recognize images that are unlike their training images, they also have to agree on that.

    ``max_difference`` is the largest difference of a probability. ``skipped_reason`` says why nothing was compared, if so.
    """

    compared: int = 0
    agreed: int = 0
    max_difference: float = 0.0
    skipped_reason: str | None = None

    @property
    def fraction(self) -> float:
        return self.agreed / self.compared if self.compared else 1.0


@dataclass(frozen=True)
class RecentPrediction:
    """Pixels (H, W, C) uint8 and the results of the model with the ``version``.

    ``probabilities`` is (classes,). ``in_distribution`` is None if the model cannot say.
    """

    version: str
    pixels: Pixels
    probabilities: NDArray[np.float32]
    content_key: int  # equal for uploads with the same content
    in_distribution: bool | None = None


class RecentPredictions:
    """The predictions of the last ``max_count`` different uploads. An upload that is repeated counts once."""

    def __init__(self, max_count: int) -> None:
        self._max_count = max_count
        self._rows: OrderedDict[int, RecentPrediction] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, prediction: RecentPrediction) -> None:
        """Keep a prediction and drop the oldest one if there are too many."""
        if not self._max_count:
            return
        with self._lock:
            self._rows[prediction.content_key] = prediction
            self._rows.move_to_end(prediction.content_key)
            if len(self._rows) > self._max_count:
                self._rows.popitem(last=False)

    def compare(self, version: str, engine: Engine, other: str, rule: DecisionRule) -> tuple[Agreement, list[RecentPrediction]]:
        """Run the kept images of one model through the engine of another that takes the same pixels.

        Args:
            version: The version of the model whose predictions were kept.
            engine: The other model's engine.
            other: The other model's version.
            rule: When the other model abstains.

        Returns:
            How far they agree, and the other model's predictions.
        """
        with self._lock:
            rows = [row for row in self._rows.values() if row.version == version]
        if not rows:
            return Agreement(skipped_reason="no recent predictions" if self._max_count else "SHADOW_SAMPLES is 0"), []
        before = np.stack([row.probabilities for row in rows])
        after, *scores = engine.run(np.stack([row.pixels for row in rows]))
        known = [rule.is_in_distribution(score) for score in (scores[0].tolist() if scores else [None] * len(rows))]
        predictions = [
            RecentPrediction(other, row.pixels, values, row.content_key, in_distribution)
            for row, values, in_distribution in zip(rows, after, known, strict=True)
        ]
        agreed = sum(map(_agree, rows, predictions))
        return Agreement(len(rows), agreed, float(np.abs(before - after).max())), predictions

    def replace(self, predictions: Iterable[RecentPrediction]) -> None:
        """Keep these predictions only."""
        with self._lock:
            self._rows.clear()
        for prediction in predictions:
            self.add(prediction)


def _agree(before: RecentPrediction, after: RecentPrediction) -> bool:
    known = before.in_distribution, after.in_distribution
    return bool(before.probabilities.argmax() == after.probabilities.argmax()) and (None in known or known[0] == known[1])

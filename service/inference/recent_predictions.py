"""The last answered photos, as the model saw them: what a new bundle has to agree on with the one that it follows.

In memory only and bounded. Photos' files and names are not kept, and nothing of it is ever written or shown.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.runtime.openvino_engine import Engine, Pixels


@dataclass(frozen=True)
class Agreement:
    """Of ``compared`` photos ``agreed`` got the same label; ``skipped_reason`` says why none were compared, where none were."""

    compared: int = 0
    agreed: int = 0
    max_difference: float = 0.0  # of a probability
    skipped_reason: str | None = None

    @property
    def fraction(self) -> float:
        return self.agreed / self.compared if self.compared else 1.0


@dataclass(frozen=True)
class RecentPrediction:
    """A photo as the model saw it, (H, W, C) uint8, and the probabilities (classes,) that the model ``version`` gave it."""

    version: str
    pixels: Pixels
    probabilities: NDArray[np.float32]
    content_key: int  # tells what was sent from other photos (service.http.uploads)


class RecentPredictions:
    """The last ``most`` different photos by what was sent, so that one that is sent again and again counts once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: OrderedDict[int, RecentPrediction] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, seen: RecentPrediction) -> None:
        """Keep an answer; the oldest goes where there are too many."""
        if not self._most:
            return
        with self._lock:
            self._seen[seen.content_key] = seen
            self._seen.move_to_end(seen.content_key)
            if len(self._seen) > self._most:
                self._seen.popitem(last=False)

    def compare(self, version: str, engine: Engine, other: str) -> tuple[Agreement, list[RecentPrediction]]:
        """Run what the model ``version`` answered through the ``engine`` of the ``other``, which takes the same pixels.

        Gives how far they agree, and the other's answers, to be ``replace``d by where it serves from now on.
        """
        with self._lock:
            seen = [row for row in self._seen.values() if row.version == version]
        if not seen:
            return Agreement(skipped_reason="no photo was answered lately" if self._most else "SHADOW_SAMPLES is 0"), []
        before = np.stack([row.probabilities for row in seen])
        after = engine.run(np.stack([row.pixels for row in seen]))[0]
        agreed = int((before.argmax(axis=1) == after.argmax(axis=1)).sum())
        answers = [
            RecentPrediction(other, row.pixels, values, row.content_key) for row, values in zip(seen, after, strict=True)
        ]
        return Agreement(len(seen), agreed, float(np.abs(before - after).max())), answers

    def replace(self, seen: Iterable[RecentPrediction]) -> None:
        """Forget all but these."""
        with self._lock:
            self._seen.clear()
        for row in seen:
            self.add(row)

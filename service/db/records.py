"""Row types: what queries return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.db.filter import UNLABELED
from service.db.schema import UNKNOWN


@dataclass(frozen=True)
class ModelRecord:
    """A model that the database has predictions of."""

    id: int
    version: str
    name: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class DecisionRecord:
    """The current review of a photo: ``label`` with its ``new_label``, ``neither`` or ``bad``."""

    id: int
    decision: str
    new_label: str | None
    note: str
    reviewer: str
    decided_at: datetime


@dataclass(frozen=True, eq=False)
class PredictionRecord:
    """A model's prediction for one photo, and the current review of the photo.

    ``probabilities`` is (C,) float32 in the order of the model's classes. ``unlike`` is whether the photo is unlike the
    training images. ``received_at`` is the time of arrival of a production photo.
    """

    id: int
    photo: str
    sha256: str
    source: str
    split: str
    label: str | None
    predicted: str
    confidence: float
    margin: float
    loss: float | None
    true_probability: float | None
    probabilities: NDArray[np.float32]
    review: str
    duplicate: bool
    mislabeled: bool
    unlike: bool
    ood_score: float | None
    shuffle: int
    received_at: datetime | None
    decision: DecisionRecord | None

    @property
    def outcome(self) -> str:
        return "unlabeled" if self.label is None else "correct" if self.label == self.predicted else "incorrect"


class Bucket(NamedTuple):
    """One combination of all values that a filter can select, and the number of photos that have it.

    ``label`` and ``predicted`` are class names. ``label`` is UNLABELED for a production photo without a label.
    """

    id: int
    source: str
    split: str
    label: str
    predicted: str
    percent: int
    review: str
    duplicate: bool
    mislabeled: bool
    unlike: bool
    images: int

    @property
    def outcome(self) -> str:
        return "unlabeled" if self.label == UNLABELED else "correct" if self.label == self.predicted else "incorrect"

    @classmethod
    def from_row(cls, row: Sequence[object], classes: Sequence[str]) -> Bucket:
        """Create a bucket from a database row, which has indices into ``classes``."""
        id_, source, split, label, predicted, *rest = row
        assert isinstance(label, int)
        assert isinstance(predicted, int)
        name = UNLABELED if label == UNKNOWN else classes[label]
        return cls(id_, source, split, name, classes[predicted], *rest)  # type: ignore[arg-type]

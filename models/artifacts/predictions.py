"""What a network said of each photo, as arrays in memory and as a CSV file that any tool reads."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.artifacts.atomic_io import atomic_write
from models.errors import BundleError

MIN_PROBABILITY = 1e-12
SUM_TOLERANCE = 1e-3  # half precision on some runtimes misses 1 by this much
LEADING_COLUMNS = ["photo", "label", "predicted"]
TRAILING_COLUMNS = ["loss", "split", "sha256"]


def cross_entropy(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """The natural-log loss of each photo, -log p(true class), with p floored at 1e-12 so that it stays finite.

    Takes labels (N,) and probabilities (N, C); returns (N,).
    """
    true = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.clip(true, MIN_PROBABILITY, 1.0)) + 0.0  # + 0.0 turns -0.0 into 0.0


def confusion_counts(labels: NDArray[np.int64], predicted: NDArray[np.int64], class_count: int) -> NDArray[np.int64]:
    """How many photos of each true class (rows) were predicted as each class (columns): (class_count, class_count).

    As scikit-learn's confusion_matrix, which however warns where there is one class only.
    """
    cells = np.bincount(labels * class_count + predicted, minlength=class_count**2)
    return cells.astype(np.int64).reshape(class_count, class_count)


def check_probabilities(labels: NDArray[np.int64], probabilities: NDArray[np.float64], class_count: int) -> None:
    """Raise ValueError unless ``labels`` is (N,) class indices and ``probabilities`` (N, class_count) rows of sum 1."""
    if labels.ndim != 1 or probabilities.shape != (len(labels), class_count):
        raise ValueError(
            f"Labels of shape {labels.shape} and probabilities of shape {probabilities.shape} arrived; "
            f"(N,) and (N, {class_count}) were wanted, one column for each class."
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < class_count):
        raise ValueError(f"Labels run from {labels.min()} to {labels.max()}, but there are {class_count} classes.")
    bad = _no_distribution(probabilities)
    if len(bad):
        raise ValueError(f"Row {bad[0]} of the probabilities is {probabilities[bad[0]]}, which is no distribution.")


def _no_distribution(probabilities: NDArray[np.float64]) -> NDArray[np.intp]:
    """The rows with a value outside 0..1 or with a sum other than 1; a NaN fails both."""
    within = ((probabilities >= 0.0) & (probabilities <= 1.0 + SUM_TOLERANCE)).all(axis=1)
    return np.flatnonzero(~(within & (np.abs(probabilities.sum(axis=1) - 1.0) <= SUM_TOLERANCE)))


@dataclass(frozen=True, eq=False)
class Predictions:
    """The class probabilities of N photos, beside what the photos are.

    ``image_names`` are POSIX paths relative to the data folder ("valid/cats/cat.1.jpg"); ``labels`` (N,) index ``classes``;
    ``probabilities`` is (N, C); ``splits`` and ``sha256s`` hold one text for each photo. Raises ValueError where
    lengths, shapes or values do not fit together.
    """

    classes: tuple[str, ...]
    image_names: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    splits: tuple[str, ...]
    sha256s: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"Classes {self.classes} arrived; at least one was wanted, each with its own name.")
        if len({len(self.image_names), len(self.labels), len(self.splits), len(self.sha256s)}) != 1:
            raise ValueError(
                f"{len(self.image_names)} photos, {len(self.labels)} labels, {len(self.splits)} splits and "
                f"{len(self.sha256s)} sha256s arrived; one of each for each photo was wanted."
            )
        check_probabilities(self.labels, self.probabilities, len(self.classes))

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(N,) the index of the most probable class; the first where several are equal."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    @property
    def losses(self) -> NDArray[np.float64]:
        """(N,) natural-log cross entropy; see ``cross_entropy``."""
        return cross_entropy(self.labels, self.probabilities)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) whether the most probable class is the true one."""
        return np.asarray(self.predicted == self.labels)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """(N,) the probability of the most probable class."""
        return np.asarray(self.probabilities.max(axis=1))

    def write_csv(self, path: Path) -> None:
        """Write one row a photo: photo, label, predicted, p_<class>..., loss, split, sha256; whole or not at all.

        Label and predicted are class names. Nine significant digits bring every float32 back exactly.
        """
        predicted, losses = self.predicted, self.losses
        # surrogateescape: on Linux a file's name can be bytes that are no UTF-8
        with atomic_write(path) as part, part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*LEADING_COLUMNS, *(f"p_{name}" for name in self.classes), *TRAILING_COLUMNS])
            for i, photo in enumerate(self.image_names):
                numbers = [f"{probability:.9g}" for probability in self.probabilities[i]]
                names = [self.classes[self.labels[i]], self.classes[predicted[i]]]
                writer.writerow([photo, *names, *numbers, f"{losses[i]:.9g}", self.splits[i], self.sha256s[i]])

    @classmethod
    def read_csv(cls, path: Path) -> Predictions:
        """Read what ``write_csv`` wrote; predicted and loss are not read but follow from the probabilities.

        Raises BundleError for a file that is missing or malformed; it names the row (the header is row 1) and column.
        """
        try:
            # utf-8-sig: spreadsheets put a byte order mark in front
            with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                header, *rows = list(csv.reader(file, strict=True)) or [[]]
        except (OSError, csv.Error) as error:
            raise BundleError(f"{path} cannot be read as a table of predictions ({error}); evaluate again.") from None
        classes = _classes_of(header, path)
        labels = np.zeros(len(rows), dtype=np.int64)
        probabilities = np.zeros((len(rows), len(classes)))
        for i, row in enumerate(rows):
            labels[i], probabilities[i] = _parse(row, header, classes, f"{path}, row {i + 2}")
        image_names, splits, sha256s = (tuple(row[column] for row in rows) for column in (0, -2, -1))
        return cls(classes, image_names, labels, probabilities, splits, sha256s)


def _classes_of(header: Sequence[str], path: Path) -> tuple[str, ...]:
    middle = header[len(LEADING_COLUMNS) : -len(TRAILING_COLUMNS)]
    named = bool(middle) and all(name.startswith("p_") for name in middle) and len(set(middle)) == len(middle)
    if not named or header[: len(LEADING_COLUMNS)] != LEADING_COLUMNS or header[-len(TRAILING_COLUMNS) :] != TRAILING_COLUMNS:
        raise BundleError(
            f"{path}, row 1 has the columns {','.join(header)!r}; photo,label,predicted,p_<class>...,loss,split,sha256 "
            "were wanted, one p_ column for each class; evaluate again to write the file anew."
        )
    return tuple(name.removeprefix("p_") for name in middle)


def _parse(row: Sequence[str], header: Sequence[str], classes: Sequence[str], place: str) -> tuple[int, list[float]]:
    """The label's index and the probabilities of one row; ``place`` names file and row for the BundleError."""
    again = "evaluate again to write the file anew."
    if len(row) != len(header):
        last = header[min(len(row), len(header)) - 1]
        raise BundleError(f"{place} has {len(row)} columns, up to {last!r}, not the header's {len(header)}; {again}")
    if row[1] not in classes:
        raise BundleError(f"{place}, column 'label' is {row[1]!r}, but there is no column 'p_{row[1]}'; {again}")
    columns = slice(len(LEADING_COLUMNS), -len(TRAILING_COLUMNS))
    numbers = [_number(text) for text in row[columns]]
    for name, text, number in zip(header[columns], row[columns], numbers, strict=True):
        if not 0.0 <= number <= 1.0 + SUM_TOLERANCE:
            raise BundleError(f"{place}, column {name!r} is {text!r}, not a probability from 0 to 1; {again}")
    if abs(sum(numbers) - 1.0) > SUM_TOLERANCE:
        raise BundleError(f"{place}, columns 'p_{classes[0]}' to 'p_{classes[-1]}' sum to {sum(numbers):.6g}; {again}")
    return classes.index(row[1]), numbers


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

"""Class probabilities per image, in memory and as ``predictions.csv``."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.artifacts.atomic_io import atomic_write
from models.artifacts.text_table import csv_writer
from models.errors import BundleError

MIN_PROBABILITY = 1e-12
SUM_TOLERANCE = 1e-3  # half-precision probabilities may sum to 1 only within this error
LEADING_COLUMNS = ["photo", "label", "predicted"]
TRAILING_COLUMNS = ["loss", "split", "sha256"]
GROUP_COLUMN, FACET_PREFIX = "group", "facet_"  # after the trailing columns, for photos of a table
ODD_FILE_COLUMN = "odd_file"  # with them, if a photo is odd
OOD_COLUMN = "ood_score"  # before the trailing columns; missing for a model without the score
RERUN_HINT = "Run `finetune evaluate` again to recreate the file."


def cross_entropy(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the cross-entropy loss per image: -ln p(true class), with p at least 1e-12 to keep it finite.

    Args:
        labels: (N,) class indices.
        probabilities: (N, C).

    Returns:
        (N,) losses in nats.
    """
    true = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.clip(true, MIN_PROBABILITY, 1.0)) + 0.0  # + 0.0 turns -0.0 into 0.0


def confusion_counts(labels: NDArray[np.int64], predicted: NDArray[np.int64], class_count: int) -> NDArray[np.int64]:
    """Compute the confusion matrix: rows are true classes, columns are predicted classes.

    Equivalent to scikit-learn's ``confusion_matrix``, which warns if there is only one class.

    Args:
        labels: (N,) true class indices.
        predicted: (N,) predicted class indices.
        class_count: The number of classes.

    Returns:
        (class_count, class_count) image counts.
    """
    counts = np.bincount(labels * class_count + predicted, minlength=class_count**2)
    return counts.astype(np.int64).reshape(class_count, class_count)


def check_probabilities(labels: NDArray[np.int64], probabilities: NDArray[np.float64], class_count: int) -> None:
    """Raise ValueError unless ``labels`` are (N,) class indices and ``probabilities`` are (N, class_count) rows of sum 1."""
    if labels.ndim != 1 or probabilities.shape != (len(labels), class_count):
        raise ValueError(
            f"Expected labels of shape (N,) and probabilities of shape (N, {class_count}), one column per class; "
            f"got {labels.shape} and {probabilities.shape}."
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < class_count):
        raise ValueError(f"Labels must be from 0 to {class_count - 1}, got {labels.min()} to {labels.max()}.")
    invalid = _invalid_rows(probabilities)
    if len(invalid):
        raise ValueError(f"Row {invalid[0]} is not a probability distribution: {probabilities[invalid[0]]}.")


def _invalid_rows(probabilities: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the rows with a value outside 0..1 or a sum other than 1, including rows with NaN."""
    in_range = ((probabilities >= 0.0) & (probabilities <= 1.0 + SUM_TOLERANCE)).all(axis=1)
    return np.flatnonzero(~(in_range & (np.abs(probabilities.sum(axis=1) - 1.0) <= SUM_TOLERANCE)))


@dataclass(frozen=True, eq=False)
class Predictions:
    """The class probabilities of N images, with their labels and origins. Raises ValueError for inconsistent values.

    Attributes:
        classes: The C class names.
        image_names: POSIX paths relative to the data folder ("valid/cats/cat.1.jpg").
        labels: (N,) true class indices.
        probabilities: (N, C).
        splits: The split of each image.
        sha256s: The SHA-256 of each image file.
        groups: The group of each image, empty for an image of its own; no entries if there are no groups.
        facets: The values of further columns of a table for each image, by the column's name.
        odd_files: What is odd about the file of each image, such as "dark, odd shape"; no entries if nothing is.
        ood_scores: (N,) how unlike the training images each image is, or None if the model has no such score.
    """

    classes: tuple[str, ...]
    image_names: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    splits: tuple[str, ...]
    sha256s: tuple[str, ...]
    groups: tuple[str, ...] = ()
    facets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ood_scores: NDArray[np.float32] | None = None
    odd_files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"Expected one or more distinct class names, got {self.classes}.")
        if len({len(self.image_names), len(self.labels), len(self.splits), len(self.sha256s)}) != 1:
            raise ValueError(
                f"Expected one label, split and sha256 per image; got {len(self.image_names)} images, "
                f"{len(self.labels)} labels, {len(self.splits)} splits and {len(self.sha256s)} sha256s."
            )
        columns = {"group": self.groups or self.sha256s, "odd file": self.odd_files or self.sha256s, **self.facets}
        for name, values in columns.items():
            if len(values) != len(self.labels):
                raise ValueError(f"Expected one {name} per image, got {len(values)} for {len(self.labels)} images.")
        if self.ood_scores is not None and self.ood_scores.shape != (len(self.labels),):
            raise ValueError(f"Expected one OOD score per image, got {self.ood_scores.shape} for {len(self.labels)} images.")
        check_probabilities(self.labels, self.probabilities, len(self.classes))

    @property
    def group_numbers(self) -> NDArray[np.int64] | None:
        """(N,) number of each image's group, with a number of its own for an image without a group; None without groups."""
        if not any(self.groups):
            return None
        numbers: dict[tuple[str, int], int] = {}
        keys = ((group, -1 if group else i) for i, group in enumerate(self.groups))
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(N,) index of the most probable class; the first one if several are equal."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    @property
    def losses(self) -> NDArray[np.float64]:
        """(N,) cross-entropy loss in nats; see ``cross_entropy``."""
        return cross_entropy(self.labels, self.probabilities)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) whether the predicted class is the true one."""
        return np.asarray(self.predicted == self.labels)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """(N,) probability of the predicted class."""
        return np.asarray(self.probabilities.max(axis=1))

    def write_csv(self, path: Path) -> None:
        """Write one row per image, atomically: photo, label, predicted, p_<class>..., loss, split, sha256.
        The column ood_score before the loss is written if there are scores.

        The columns group and odd_file follow if they are not empty, and a column facet_<name> for each facet.

        ``label`` and ``predicted`` are class names. Nine significant digits preserve every float32 exactly.
        """
        predicted, losses = self.predicted, self.losses
        table = {GROUP_COLUMN: self.groups} if any(self.groups) else {}
        table |= {ODD_FILE_COLUMN: self.odd_files} if any(self.odd_files) else {}
        table |= {f"{FACET_PREFIX}{name}": values for name, values in self.facets.items()}
        # surrogateescape: on Linux a file name may not be valid UTF-8
        with atomic_write(path) as temp, temp.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv_writer(file)
            ood_column = [] if self.ood_scores is None else [OOD_COLUMN]
            probabilities = [f"p_{name}" for name in self.classes]
            writer.writerow([*LEADING_COLUMNS, *probabilities, *ood_column, *TRAILING_COLUMNS, *table])
            for i, image_name in enumerate(self.image_names):
                numbers = [f"{probability:.9g}" for probability in self.probabilities[i]]
                if self.ood_scores is not None:
                    numbers.append(f"{self.ood_scores[i]:.9g}")
                names = [self.classes[self.labels[i]], self.classes[predicted[i]]]
                further = [values[i] for values in table.values()]
                writer.writerow([image_name, *names, *numbers, f"{losses[i]:.9g}", self.splits[i], self.sha256s[i], *further])

    @classmethod
    def read_csv(cls, path: Path) -> Predictions:
        """Read a file of ``write_csv``. The columns predicted and loss are ignored and recomputed from the probabilities.

        Raises:
            BundleError: The file is missing or malformed. The message names the row (the header is row 1) and the column.
        """
        try:
            # utf-8-sig: spreadsheets write a byte order mark
            with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                header, *rows = list(csv.reader(file, strict=True)) or [[]]
        except (OSError, csv.Error) as error:
            raise BundleError(f"{path} cannot be read as a table of predictions ({error}). {RERUN_HINT}") from None
        _check_lengths(rows, header, path)
        header, table = _split_header(header)
        rows, table_rows = [row[: len(header)] for row in rows], [row[len(header) :] for row in rows]
        classes, has_ood_scores = _parse_header(header, path)
        labels = np.zeros(len(rows), dtype=np.int64)
        probabilities = np.zeros((len(rows), len(classes)))
        ood_scores = np.zeros(len(rows), dtype=np.float32) if has_ood_scores else None
        for i, row in enumerate(rows):
            position = f"{path}, row {i + 2}"
            labels[i], probabilities[i] = _parse_row(row, header, classes, position)
            if ood_scores is not None:
                ood_scores[i] = _parse_ood_score(row[-1 - len(TRAILING_COLUMNS)], position)
        image_names, splits, sha256s = (tuple(row[column] for row in rows) for column in (0, -2, -1))
        columns = dict(zip(table, map(tuple, zip(*table_rows, strict=True)), strict=False)) if rows else {}
        groups, odd_files = columns.pop(GROUP_COLUMN, ()), columns.pop(ODD_FILE_COLUMN, ())
        facets = {name.removeprefix(FACET_PREFIX): values for name, values in columns.items()}
        return cls(
            classes,
            image_names,
            labels,
            probabilities,
            splits,
            sha256s,
            groups=groups,
            facets=facets,
            ood_scores=ood_scores,
            odd_files=odd_files,
        )


def _split_header(header: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a header into the columns up to sha256, and those after it: group, odd_file and facet_<name>."""

    def is_further(name: str) -> bool:
        return name in (GROUP_COLUMN, ODD_FILE_COLUMN) or name.startswith(FACET_PREFIX)

    table = list(itertools.takewhile(is_further, reversed(header)))
    return list(header[: len(header) - len(table)]), table[::-1]


def _check_lengths(rows: Sequence[Sequence[str]], header: Sequence[str], path: Path) -> None:
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            last = header[min(len(row), len(header)) - 1]
            raise BundleError(
                f"{path}, row {number}: expected {len(header)} columns, got {len(row)} (up to {last!r}). {RERUN_HINT}"
            )


def _parse_header(header: Sequence[str], path: Path) -> tuple[tuple[str, ...], bool]:
    """Return the class names of a header row, and whether there is a column of OOD scores."""
    columns = header[len(LEADING_COLUMNS) : -len(TRAILING_COLUMNS)]
    has_ood_scores = columns[-1:] == [OOD_COLUMN]
    columns = columns[:-1] if has_ood_scores else columns
    is_valid = bool(columns) and all(name.startswith("p_") for name in columns) and len(set(columns)) == len(columns)
    if (
        not is_valid
        or header[: len(LEADING_COLUMNS)] != LEADING_COLUMNS
        or header[-len(TRAILING_COLUMNS) :] != TRAILING_COLUMNS
    ):
        raise BundleError(
            f"{path}, row 1: expected the columns photo,label,predicted,p_<class>...,loss,split,sha256 with one p_ column per "
            f"class, got {','.join(header)!r}. {RERUN_HINT}"
        )
    return tuple(name.removeprefix("p_") for name in columns), has_ood_scores


def _parse_row(row: Sequence[str], header: Sequence[str], classes: Sequence[str], position: str) -> tuple[int, list[float]]:
    """Return the label's index and the probabilities of a row; ``position`` is the file and row for error messages."""
    if row[1] not in classes:
        raise BundleError(f"{position}, column 'label': {row[1]!r} has no column 'p_{row[1]}'. {RERUN_HINT}")
    columns = slice(len(LEADING_COLUMNS), len(LEADING_COLUMNS) + len(classes))
    values = [_parse_float(text) for text in row[columns]]
    for name, text, value in zip(header[columns], row[columns], values, strict=True):
        if not 0.0 <= value <= 1.0 + SUM_TOLERANCE:
            raise BundleError(f"{position}, column {name!r}: expected a probability from 0 to 1, got {text!r}. {RERUN_HINT}")
    if abs(sum(values) - 1.0) > SUM_TOLERANCE:
        raise BundleError(
            f"{position}: columns 'p_{classes[0]}' to 'p_{classes[-1]}' sum to {sum(values):.6g}, expected 1. {RERUN_HINT}"
        )
    return classes.index(row[1]), values


def _parse_ood_score(text: str, position: str) -> float:
    score = _parse_float(text)
    if not 0 <= score < math.inf:
        raise BundleError(f"{position}, column {OOD_COLUMN!r}: expected a number of 0 or more, got {text!r}. {RERUN_HINT}")
    return score


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

"""Similar images: an embedding per evaluated image, and groups of exact and near duplicates.

Both files are stored next to ``predictions.csv``. Older bundles have neither, and their index is empty.
"""

from __future__ import annotations

import csv
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.artifacts.atomic_io import atomic_write
from models.artifacts.predictions import RERUN_HINT
from models.artifacts.text_table import csv_writer
from models.errors import BundleError

EMBEDDINGS, DUPLICATES = "embeddings.npz", "duplicates.csv"
SIMILARITY_FILES = (EMBEDDINGS, DUPLICATES)
MAP_SIZE = 9_999  # the length of each side of a map


@dataclass(frozen=True)
class DuplicateRow:
    """One image of a group of exact or near duplicates; ``group`` starts at 1 and ``label`` is a class name."""

    group: int
    photo: str
    label: str
    split: str
    sha256: str


COLUMNS = [field.name for field in fields(DuplicateRow)]


@dataclass(frozen=True, eq=False)
class SimilarityIndex:
    """Embeddings for nearest-neighbor search, and duplicate groups. Raises ValueError if the lengths do not match.

    Attributes:
        sha256s: The N evaluated images, in the order of predictions.csv.
        embeddings: (N, d) float16 unit vectors.
        duplicates: Duplicates in the complete dataset, sorted by group.
    """

    sha256s: tuple[str, ...]
    embeddings: NDArray[np.float16]
    duplicates: tuple[DuplicateRow, ...] = ()

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.sha256s):
            raise ValueError(
                f"Expected embeddings of shape ({len(self.sha256s)}, d), one row per image; got {self.embeddings.shape}."
            )

    @classmethod
    def empty(cls) -> SimilarityIndex:
        return cls((), np.zeros((0, 1), dtype=np.float16))

    @classmethod
    def read(cls, folder: Path) -> SimilarityIndex:
        """Read both files from a bundle or an evaluation folder. A missing file counts as empty.

        Raises:
            BundleError: A file is malformed.
        """
        sha256s, embeddings = _read_embeddings(folder / EMBEDDINGS)
        return cls(sha256s, embeddings, _read_duplicates(folder / DUPLICATES))

    def write(self, folder: Path) -> None:
        """Write both files to ``folder``, each atomically."""
        sha256s = np.array([text.encode("ascii") for text in self.sha256s], dtype="S64")
        with atomic_write(folder / EMBEDDINGS) as temp, temp.open("wb") as file:
            np.savez_compressed(file, sha256=sha256s, embedding=self.embeddings.astype(np.float16))
        # surrogateescape: on Linux a file name may not be valid UTF-8
        with (
            atomic_write(folder / DUPLICATES) as temp,
            temp.open("w", encoding="utf-8", errors="surrogateescape", newline="") as text,
        ):
            writer = csv_writer(text)
            writer.writerow(COLUMNS)
            writer.writerows(astuple(duplicate) for duplicate in self.duplicates)

    def nearest(self, row: int, count: int) -> list[tuple[int, float]]:
        """Find the ``count`` rows most similar to ``row``, excluding itself.

        Returns:
            (row, cosine similarity) pairs, the most similar first; empty if there are no embeddings.
        """
        if not len(self.embeddings):
            return []
        similarity = self._float32 @ self._float32[row]
        similarity[row] = -np.inf
        count = min(count, len(similarity) - 1)
        top = np.argpartition(-similarity, count)[:count] if count else np.zeros(0, dtype=np.intp)
        ordered = sorted(top.tolist(), key=lambda other: (-similarity[other], other))
        return [(other, float(similarity[other])) for other in ordered]

    def similar_to(self, row: int, min_similarity: float) -> list[int]:
        """Find all rows with at least this cosine similarity to ``row``, including itself."""
        similarity = self._float32 @ self._float32[row]
        similarity[row] = 1.0
        return np.flatnonzero(similarity >= min_similarity).tolist()

    def inside(self, polygon: Sequence[tuple[int, int]]) -> list[int]:
        """Find the rows whose points on the map are inside a polygon, by the even-odd rule."""
        x, y = self.points.T.astype(np.float64)
        is_inside = np.zeros(len(x), dtype=np.bool_)
        for (x1, y1), (x2, y2) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
            if y1 != y2:
                crosses = (y1 > y) != (y2 > y)
                is_inside ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
        return np.flatnonzero(is_inside).tolist()

    @cached_property
    def row_by_sha256(self) -> dict[str, int]:
        """The first row of each image."""
        return {sha256: row for row, sha256 in reversed(list(enumerate(self.sha256s)))}

    @cached_property
    def points(self) -> NDArray[np.int64]:
        """A map of the embeddings: (N, 2) coordinates along their first two principal components.

        They are between 0 and MAP_SIZE, and not equal to them, so that a region can enclose all points.

        The embeddings were reduced by PCA when they were evaluated, so this takes milliseconds. UMAP separates more clusters,
        but needs numba (over 100 MB) and is not reproducible between machines.
        """
        if not len(self.embeddings):
            return np.zeros((0, 2), dtype=np.int64)
        centered = self._float32 - self._float32.mean(axis=0)
        _, components = np.linalg.eigh(centered.T @ centered)  # ascending eigenvalues
        axes = components[:, ::-1][:, :2]
        axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)  # fixes the signs
        points = np.zeros((len(centered), 2))
        points[:, : axes.shape[1]] = centered @ axes
        low, high = points.min(axis=0), points.max(axis=0)
        scale = (high - low).max() or 1.0  # one scale for both axes, so that distances can be compared
        return np.asarray(np.rint((points - (low + high) / 2) / scale * (MAP_SIZE - 2) + MAP_SIZE / 2), dtype=np.int64)

    @cached_property
    def groups(self) -> dict[str, int]:
        """The number of the duplicate group of each evaluated image that shares one with another, by sha256."""
        evaluated = [duplicate for duplicate in self.duplicates if duplicate.sha256 in self.row_by_sha256]
        sizes = Counter(duplicate.group for duplicate in evaluated)
        return {duplicate.sha256: duplicate.group for duplicate in evaluated if sizes[duplicate.group] > 1}

    def duplicates_of(self, name: str) -> tuple[DuplicateRow, ...]:
        """Return the duplicate group of the image with this SHA-256 or name, including the image; empty if it has none."""
        return self._groups[self._group_by_name[name]] if name in self._group_by_name else ()

    @cached_property
    def _float32(self) -> NDArray[np.float32]:
        return self.embeddings.astype(np.float32)

    @cached_property
    def _groups(self) -> dict[int, tuple[DuplicateRow, ...]]:
        groups: dict[int, list[DuplicateRow]] = {}
        for duplicate in self.duplicates:
            groups.setdefault(duplicate.group, []).append(duplicate)
        return {group: tuple(members) for group, members in groups.items()}

    @cached_property
    def _group_by_name(self) -> dict[str, int]:
        return {name: d.group for d in self.duplicates for name in (d.sha256, d.photo)}


def _read_embeddings(path: Path) -> tuple[tuple[str, ...], NDArray[np.float16]]:
    if not path.is_file():
        return (), SimilarityIndex.empty().embeddings
    try:
        if not zipfile.is_zipfile(path):  # np.load does not close a truncated archive
            raise ValueError("not a zip archive")
        with np.load(path, allow_pickle=False) as arrays:
            sha256s, embeddings = arrays["sha256"], arrays["embedding"]
        is_valid = sha256s.dtype.kind == "S" and embeddings.dtype.kind == "f" and embeddings.shape[:1] == sha256s.shape
        if not is_valid or embeddings.ndim != 2 or not np.isfinite(embeddings).all():
            raise ValueError(f"sha256 is {sha256s.dtype} {sha256s.shape}, embedding {embeddings.dtype} {embeddings.shape}")
        return tuple(text.decode("ascii") for text in sha256s.tolist()), embeddings.astype(np.float16)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:160]
        raise BundleError(f"{path} cannot be read as image embeddings ({reason}). {RERUN_HINT}") from None


def _read_duplicates(path: Path) -> tuple[DuplicateRow, ...]:
    if not path.is_file():
        return ()
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, csv.Error) as error:
        raise BundleError(f"{path} cannot be read as a table of duplicates ({error}). {RERUN_HINT}") from None
    if header != COLUMNS:
        raise BundleError(f"{path}, row 1: expected the columns {','.join(COLUMNS)}, got {','.join(header)!r}. {RERUN_HINT}")
    return tuple(_parse_row(row, f"{path}, row {number}") for number, row in enumerate(rows, start=2))


def _parse_row(row: Sequence[str], position: str) -> DuplicateRow:
    if len(row) != len(COLUMNS) or not row[0].isdecimal():
        raise BundleError(
            f"{position}: expected a group number and {len(COLUMNS) - 1} text columns, got {','.join(row)!r}. {RERUN_HINT}"
        )
    return DuplicateRow(int(row[0]), *row[1:])

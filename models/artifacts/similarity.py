"""Which photos look alike: an embedding of each evaluated one, and the groups that are the same to the byte or to the eye.

Both lie beside ``predictions.csv``. A bundle that was written before there were any has neither, and nothing looks alike then.
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.artifacts.atomic_io import atomic_write
from models.errors import BundleError

EMBEDDINGS, DUPLICATES = "embeddings.npz", "duplicates.csv"
SIMILARITY_FILES = (EMBEDDINGS, DUPLICATES)
AGAIN = "evaluate again to write the file anew."


@dataclass(frozen=True)
class DuplicateRow:
    """A photo of a group that is the same to the byte or to the eye; ``group`` counts from 1, ``label`` is a class's name."""

    group: int
    photo: str
    label: str
    split: str
    sha256: str


COLUMNS = [field.name for field in fields(DuplicateRow)]


@dataclass(frozen=True, eq=False)
class SimilarityIndex:
    """``embeddings`` (N, d) float16 of unit length, a row for each of ``sha256s``, in the order of predictions.csv.

    ``duplicates`` are photos of the whole dataset, a group's one after another. Raises ValueError where lengths do not fit.
    """

    sha256s: tuple[str, ...]
    embeddings: NDArray[np.float16]
    duplicates: tuple[DuplicateRow, ...] = ()

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.sha256s):
            raise ValueError(
                f"Embeddings of shape {self.embeddings.shape} arrived; (N, d) was wanted for {len(self.sha256s)} photos."
            )

    @classmethod
    def empty(cls) -> SimilarityIndex:
        return cls((), np.zeros((0, 1), dtype=np.float16))

    @classmethod
    def read(cls, folder: Path) -> SimilarityIndex:
        """Read both files of a bundle or an evaluation; a missing one is empty. Raises BundleError for a malformed one."""
        sha256s, embeddings = _read_embeddings(folder / EMBEDDINGS)
        return cls(sha256s, embeddings, _read_duplicates(folder / DUPLICATES))

    def write(self, folder: Path) -> None:
        """Write both files into ``folder``, each whole or not at all."""
        sha256s = np.array([text.encode("ascii") for text in self.sha256s], dtype="S64")
        with atomic_write(folder / EMBEDDINGS) as part, part.open("wb") as file:
            np.savez_compressed(file, sha256=sha256s, embedding=self.embeddings.astype(np.float16))
        # surrogateescape: on Linux a file's name can be bytes that are no UTF-8
        with (
            atomic_write(folder / DUPLICATES) as part,
            part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as text,
        ):
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(astuple(duplicate) for duplicate in self.duplicates)

    def nearest(self, row: int, count: int) -> list[tuple[int, float]]:
        """The ``count`` rows most like ``row`` with their cosine, the nearest first, itself left out; nothing if there are no
        embeddings."""
        if not len(self.embeddings):
            return []
        similarity = self._single @ self._single[row]
        similarity[row] = -np.inf
        count = min(count, len(similarity) - 1)
        chosen = np.argpartition(-similarity, count)[:count] if count else np.zeros(0, dtype=np.intp)
        ordered = sorted(chosen.tolist(), key=lambda other: (-similarity[other], other))
        return [(other, float(similarity[other])) for other in ordered]

    def duplicates_of(self, name: str) -> tuple[DuplicateRow, ...]:
        """The photos that are the same as the one with this sha256 or name, itself among them; nothing if there are none."""
        return self._groups[self._group_by_name[name]] if name in self._group_by_name else ()

    @cached_property
    def _single(self) -> NDArray[np.float32]:
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
        if not zipfile.is_zipfile(path):  # numpy would leave a part of one open
            raise ValueError("it is no archive")
        with np.load(path, allow_pickle=False) as arrays:
            sha256s, embeddings = arrays["sha256"], arrays["embedding"]
        fits = sha256s.dtype.kind == "S" and embeddings.dtype.kind == "f" and embeddings.shape[:1] == sha256s.shape
        if not fits or embeddings.ndim != 2 or not np.isfinite(embeddings).all():
            raise ValueError(f"sha256 is {sha256s.dtype} {sha256s.shape}, embedding {embeddings.dtype} {embeddings.shape}")
        return tuple(text.decode("ascii") for text in sha256s.tolist()), embeddings.astype(np.float16)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:160]
        raise BundleError(f"{path} cannot be read as embeddings of photos ({reason}); {AGAIN}") from None


def _read_duplicates(path: Path) -> tuple[DuplicateRow, ...]:
    if not path.is_file():
        return ()
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, csv.Error) as error:
        raise BundleError(f"{path} cannot be read as a table of duplicates ({error}); {AGAIN}") from None
    if header != COLUMNS:
        raise BundleError(f"{path}, row 1 has the columns {','.join(header)!r}; {','.join(COLUMNS)} were wanted; {AGAIN}")
    return tuple(_parse(row, f"{path}, row {number}") for number, row in enumerate(rows, start=2))


def _parse(row: Sequence[str], place: str) -> DuplicateRow:
    if len(row) != len(COLUMNS) or not row[0].isdecimal():
        raise BundleError(f"{place} is {','.join(row)!r}; a group's number and {len(COLUMNS) - 1} texts were wanted; {AGAIN}")
    return DuplicateRow(int(row[0]), *row[1:])

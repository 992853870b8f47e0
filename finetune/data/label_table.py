"""Read a table of labels: CSV, TSV, Parquet or JSON Lines with the columns image, label, split, group and any others.

Every value is text: the label 1 stays "1", also in a Parquet column of floats. Bad rows are collected and reported together.
Files are not opened here; an image that is missing is found by the inspection, like a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from finetune.data.folder_layout import KNOWN_NAMES
from models.artifacts.data_folder import TABLE_EXTENSIONS, TEST, VALID, class_name, is_reserved, is_table_name, split_of
from models.artifacts.text_table import decode_text, read_text_table
from models.errors import DataError, did_you_mean

IMAGE, LABEL, SPLIT, GROUP = "image", "label", "split", "group"
REQUIRED, KNOWN = (IMAGE, LABEL), (IMAGE, LABEL, SPLIT, GROUP)
MAX_NAMED = 10  # bad rows in an error message
MAX_SHOWN_CHARS = 60
MAX_LABEL_CHARS = 200
_CONTROL = re.compile("[\0-\x1f\x7f\ud800-\udfff]")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True)
class LabelRow:
    """One image of a table.

    Attributes:
        number: Line of a text file, or row of a Parquet file, from 1.
        image: POSIX path relative to the data folder.
        label: Class name.
        split: "train", "valid" or "test"; None without a column ``split``.
        group: Images of one group stay together; empty for an image of its own.
        facets: The values of the other columns that are not empty.
    """

    number: int
    image: str
    label: str
    split: str | None
    group: str
    facets: dict[str, str]


@dataclass(frozen=True)
class LabelTable:
    """The rows of a table without repeated ones.

    Attributes:
        path: The file.
        root: Folder that the paths of the images are relative to.
        sha256: Of the file.
        rows: The rows, sorted by class, folder and name, so that their order in the file does not matter.
        facets: Names of the columns that are kept for the gallery and the slices.
        has_groups: Whether the table has a column ``group``.
        repeated: Number of rows that repeat another one.
    """

    path: Path
    root: Path
    sha256: str
    rows: tuple[LabelRow, ...]
    facets: tuple[str, ...]
    has_groups: bool
    repeated: int

    @property
    def image_paths(self) -> list[Path]:
        return [self.root / row.image for row in self.rows]

    def name_of(self, path: Path) -> str:
        """Return the name in the table of one of ``image_paths``."""
        return path.relative_to(self.root).as_posix()

    @property
    def splits(self) -> set[str | None]:
        return {row.split for row in self.rows}

    def as_dict(self) -> dict[str, Any]:
        """Return what a manifest records of the table."""
        return {
            "sha256": self.sha256,
            "rows": len(self.rows),
            "has_groups": self.has_groups,
            "has_test_split": {VALID, TEST} <= self.splits,
            "facets": list(self.facets),
        }


def is_table(path: Path) -> bool:
    """Return whether a path has the suffix of a table of labels."""
    return is_table_name(path.name)


def read_label_table(path: Path, root: Path) -> LabelTable:
    """Read and check a table.

    Args:
        path: The table.
        root: Folder that the paths of the images are relative to.

    Raises:
        DataError: The table cannot be read, lacks a column, or has bad rows. The message names up to ten of them.
    """
    if not is_table(path):
        raise DataError(f"{path} is not a table of labels. Expected a file that ends with {', '.join(TABLE_EXTENSIONS)}.")
    if not root.is_dir():
        raise DataError(f"No such folder: {root}. --data-dir is the folder that the paths in {path.name} are relative to.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read the table of labels {path} ({error.strerror}). Check the path.") from None
    raw = _READERS[path.suffix.lower()](data, path)
    columns = _find_columns(raw, path)
    parsed = _parse_rows(raw, columns, path, root)
    if not parsed.rows:
        raise DataError(f"{path} has no rows. Add a row for each image, with at least {' and '.join(REQUIRED)}.")
    _require_images(parsed.rows.values(), path, root)
    rows = sorted(parsed.rows.values(), key=lambda row: (row.label, *posixpath.split(row.image)))
    facets = tuple(name for name in columns.values() if name not in KNOWN)
    has_groups = any(row.group for row in rows)
    return LabelTable(path, root, hashlib.sha256(data).hexdigest(), tuple(rows), facets, has_groups, parsed.repeated)


@dataclass(frozen=True)
class _RawTable:
    """The cells of a file as text. ``unit`` is what a row number counts: "line" or "row"."""

    columns: Sequence[str]
    rows: Iterable[tuple[int, Sequence[str]]]
    unit: str = "line"


@dataclass
class _ParsedRows:
    """The good rows by image, and a description of each bad row."""

    rows: dict[str, LabelRow] = field(default_factory=dict)
    repeated: int = 0
    problems: list[str] = field(default_factory=list)


class _BadValueError(Exception):
    """A value that cannot be used: its column, and what was expected."""

    def __init__(self, column: str, value: str, expected: str) -> None:
        super().__init__(column, value, expected)
        self.column, self.value, self.expected = column, value, expected


def _read_text(data: bytes, path: Path) -> _RawTable:
    table = read_text_table(data, origin=str(path), kind="labels")
    return _RawTable(table.columns, table.rows)


def _read_json_lines(data: bytes, path: Path) -> _RawTable:
    columns: dict[str, int] = {}
    objects = []
    for number, line in enumerate(decode_text(data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}). Expected one object per line.") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}, line {number}: {line.strip()[:MAX_SHOWN_CHARS]!r} is not an object. Expected {{...}}.")
        columns |= dict.fromkeys(values)
        objects.append((number, values))
    return _RawTable(list(columns), ((number, [_json_text(row.get(name)) for name in columns]) for number, row in objects))


def _json_text(value: Any) -> str:
    if value is None or value != value:  # null or NaN
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _read_parquet(data: bytes, path: Path) -> _RawTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({' '.join(str(error).split())[:160]}). Write it again.") from None
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            missing = ("nan", None) if pa.types.is_floating(column.type) else (None,)
            columns[name] = ["" if text in missing else text for text in column.cast(pa.string()).to_pylist()]
        except pa.ArrowException:
            if name.strip().lower() in KNOWN:
                raise DataError(f"{path}, column {name!r}: expected text or numbers, got {column.type}.") from None
            columns[name] = [_json_text(value) for value in column.to_pylist()]
    return _RawTable(list(columns), enumerate(zip(*columns.values(), strict=True), start=1), unit="row")


_READERS: dict[str, Callable[[bytes, Path], _RawTable]] = {
    ".csv": _read_text,
    ".tsv": _read_text,
    ".parquet": _read_parquet,
    ".jsonl": _read_json_lines,
}


def _find_columns(raw: _RawTable, path: Path) -> dict[int, str]:
    """Return the name of each used column by its position. Columns without a name, such as a saved index, are ignored."""
    names = [_clean(name).strip() for name in raw.columns]
    names = [name.lower() if name.lower() in KNOWN else name for name in names]
    used = {position: name for position, name in enumerate(names) if name and not name.startswith(("Unnamed: ", "__index"))}
    for name in REQUIRED:
        if name not in names:
            found = ", ".join(used.values()) or "no columns"
            raise DataError(
                f"{path} has no column {name!r} (found: {found}).{did_you_mean(name, used.values())} The header needs "
                f"{' and '.join(REQUIRED)}; {SPLIT}, {GROUP} and others are optional."
            )
    repeated = [name for name in used.values() if names.count(name) > 1]
    if repeated:
        raise DataError(f"{path} has the column {repeated[0]!r} twice. Rename or remove one of them.")
    return used


def _parse_rows(raw: _RawTable, columns: dict[int, str], path: Path, root: Path) -> _ParsedRows:
    """Parse all rows. Raises DataError if any is bad."""
    parsed = _ParsedRows()
    files = _FileNames(root)
    for number, cells in raw.rows:
        try:
            _add_row(parsed, _parse_row(number, cells, columns, len(raw.columns), files), raw.unit)
        except _BadValueError as bad:
            value = bad.value if len(bad.value) <= MAX_SHOWN_CHARS else bad.value[:MAX_SHOWN_CHARS] + "..."
            column = f", column {bad.column}" if bad.column else ""
            parsed.problems.append(f"{raw.unit} {number}{column}: {value!r}, expected {bad.expected}")
    if len(parsed.problems) == 1:
        raise DataError(f"{path}, {parsed.problems[0]}. Fix or remove the row.")
    if parsed.problems:
        named = "".join(f"\n  {problem}" for problem in parsed.problems[:MAX_NAMED])
        more = len(parsed.problems) - MAX_NAMED
        rest = f"\n  and {more:,} more" if more > 0 else ""
        raise DataError(f"{path} has {len(parsed.problems):,} bad rows. Fix or remove them:{named}{rest}")
    return parsed


def _parse_row(number: int, cells: Sequence[str], columns: dict[int, str], column_count: int, files: _FileNames) -> LabelRow:
    if len(cells) < column_count or any(cells[column_count:]):
        raise _BadValueError("", f"{len(cells)} cells", f"{column_count} as in the header")
    values = {name: cells[position].strip() for position, name in columns.items()}
    image, label = values.pop(IMAGE), class_name(values.pop(LABEL))
    name = _check_image(image)
    if not label:
        raise _BadValueError(LABEL, label, "a class name")
    if is_reserved(label):
        raise _BadValueError(LABEL, label, "another name, as this one is reserved for photos without a label")
    if len(label) > MAX_LABEL_CHARS or label in (".", "..") or re.search(r"[/\\]", label) or _CONTROL.search(label):
        raise _BadValueError(LABEL, label, f"a class name in UTF-8 of up to {MAX_LABEL_CHARS} characters without / and \\")
    split = values.pop(SPLIT, None)
    kind = _split_of(split) if split is not None else None
    if split is not None and kind is None:
        raise _BadValueError(SPLIT, split, KNOWN_NAMES)
    group = _clean(values.pop(GROUP, ""))
    facets = {name: _clean(value) for name, value in values.items() if value}
    return LabelRow(number, files.resolve(name), label, kind, group, facets)


def _clean(text: str) -> str:
    """Replace line breaks and other characters that a terminal, a database or a page cannot show."""
    return text if text.isascii() and text.isprintable() else unicodedata.normalize("NFC", _CONTROL.sub(" ", text))


_split_of = cache(split_of)  # a table has few different values


def _check_image(image: str) -> str:
    """Return the normalized relative path."""
    if not image or "\0" in image:
        raise _BadValueError(IMAGE, image, "the path of a file")
    if image.startswith(("/", "\\", "~")) or "://" in image or _DRIVE.match(image):
        raise _BadValueError(IMAGE, image, "a path relative to the data folder")
    name = posixpath.normpath(image)
    if name in (".", "..") or name.startswith("../"):
        raise _BadValueError(IMAGE, image, "a path inside the data folder")
    return name


def _add_row(parsed: _ParsedRows, row: LabelRow, unit: str) -> None:
    other = parsed.rows.setdefault(row.image, row)
    if other is row:
        return
    for column in (LABEL, SPLIT, GROUP):
        mine, first = getattr(row, column) or "", getattr(other, column) or ""
        if mine != first:
            raise _BadValueError(column, mine, f"{first!r} as for the same image in {unit} {other.number}")
    for column in sorted(row.facets.keys() | other.facets.keys()):
        mine, first = row.facets.get(column, ""), other.facets.get(column, "")
        if mine != first:
            raise _BadValueError(column, mine, f"{first!r} as for the same image in {unit} {other.number}")
    parsed.repeated += 1


class _FileNames:
    """Find files whose names have another Unicode form on disk than in the table. Each folder is listed at most once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listings: dict[str, dict[str, str]] = {}

    def resolve(self, name: str) -> str:
        """Return the path as it is on disk, or unchanged if there is no such file. An ASCII path has one form only."""
        if name.isascii():
            return name
        folder = ""
        for part in name.split("/"):
            listing = {} if part.isascii() else self._list(folder)
            actual = listing.get(part) or listing.get(unicodedata.normalize("NFC", part), part)
            folder = posixpath.join(folder, actual)
        return folder

    def _list(self, folder: str) -> dict[str, str]:
        if folder not in self._listings:
            try:
                names = os.listdir(self._root / folder)
            except OSError:
                names = []
            self._listings[folder] = {unicodedata.normalize("NFC", name): name for name in names} | {n: n for n in names}
        return self._listings[folder]


def _require_images(rows: Iterable[LabelRow], path: Path, root: Path) -> None:
    """Raise DataError if none of the first images exists: the paths are probably relative to another folder."""
    first = [row.image for row, _ in zip(rows, range(100), strict=False)]
    if not any((root / image).exists() for image in first):
        raise DataError(
            f"None of the first {len(first)} images of {path} is in {root}, such as {first[0]}. Set --data-dir to the folder "
            "that the paths are relative to."
        )

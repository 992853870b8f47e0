"""Read delimited text (CSV, TSV) as programs and spreadsheets write it, and write CSV. Does not import torch."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from models.errors import DataError

SEPARATORS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class TextTable:
    """The cells of a table as text.

    Attributes:
        columns: The names in the header, without spaces around them.
        rows: The number of each row's first line (the first line of the file is 1), and its cells. A row may have more or
            fewer cells than there are columns.
    """

    columns: list[str]
    rows: list[tuple[int, list[str]]]


def read_text_table(data: bytes, *, origin: str, kind: str) -> TextTable:
    """Parse a table.

    Cells are separated by commas, semicolons, tabs or bars. Quoted cells may contain line breaks. Blank lines and the line
    ``sep=;`` of a spreadsheet are skipped.

    Args:
        data: The bytes of the file, in UTF-8 or UTF-16.
        origin: The file's name for error messages.
        kind: What the table contains, such as "reviews".

    Raises:
        DataError: A quote is not closed, or is followed by other text.
    """
    text = decode_text(data)
    separator, header_line = _find_header(text)
    try:
        rows = [row for row in _rows(text, separator) if row[0] >= header_line]
    except csv.Error as error:
        raise DataError(f"{origin} cannot be read as a table of {kind} ({error}). Save it again.") from None
    return TextTable([name.strip() for name in rows[0][1]], rows[1:]) if rows else TextTable([], [])


def csv_writer(stream: TextIO) -> Any:
    """Return a ``csv.writer`` whose rows end with a line feed, and whose cells may contain any line break.

    The standard writer leaves a carriage return unquoted if it does not end rows, and readers take it for the end of one.
    """
    return csv.writer(_LineFeeds(stream), lineterminator="\r\n")


class _LineFeeds:
    """A stream that ends the rows of a csv.writer with a line feed only."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, row: str) -> int:
        return self._stream.write(row.removesuffix("\r\n") + "\n")


def decode_text(data: bytes) -> str:
    """Decode UTF-8 or UTF-16 text, with a byte order mark or without. Bytes that are not UTF-8 become surrogates."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    if b"\0" in data[:2]:
        return data.decode("utf-16-be" if data[:1] == b"\0" else "utf-16-le", errors="replace")
    return data.decode("utf-8-sig", errors="surrogateescape")  # spreadsheets write a byte order mark


def _rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    first_line = 1
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield first_line, cells
        first_line = reader.line_num + 1


def _find_header(text: str) -> tuple[str, int]:
    """Return the separator of the columns and the number of the header's line."""
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):
        if line.lower().startswith("sep=") and len(line.rstrip("\r\n")) == 5:
            continue
        if line.strip():
            return max(SEPARATORS, key=line.count), number
    return SEPARATORS[0], 1

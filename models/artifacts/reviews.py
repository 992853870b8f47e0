"""Review decisions of people about images, and their CSV format: exported by the gallery, read by training."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace

from models.artifacts.text_table import csv_writer, read_text_table
from models.errors import DataError

LABEL, NEITHER, BAD = "label", "neither", "bad"
DECISIONS = (LABEL, NEITHER, BAD)
NOTE = "note"  # a note on a photo without a review: exported, and ignored in training


@dataclass(frozen=True)
class Review:
    """The current review of one image.

    Attributes:
        sha256: Identifies the image.
        photo: The image's name at the time of the review.
        label: The image's label at the time of the review.
        decision: "label" (the correct label is ``new_label``, possibly unchanged), "neither" (none of the classes),
            "bad" (unusable) or "note" (no review).
        new_label: The correct class if ``decision`` is "label".
        note: Free text.
        reviewer: The reviewer's name.
        decided_at: The time of the review.
    """

    sha256: str
    photo: str
    label: str
    decision: str
    new_label: str
    note: str
    reviewer: str
    decided_at: str


COLUMNS = [field.name for field in fields(Review)]


def write_reviews(reviews: Iterable[Review]) -> bytes:
    """Encode reviews as CSV in UTF-8."""
    text = io.StringIO()
    writer = csv_writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(astuple(review) for review in reviews)
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def read_reviews(data: bytes, *, origin: str) -> tuple[Review, ...]:
    """Parse a table of reviews as the gallery or a spreadsheet writes it.

    The format is that of ``read_text_table``, with the columns in any order. Additional columns and notes on photos without a
    review are ignored.

    Args:
        data: The bytes of the file.
        origin: The file's name for error messages.

    Raises:
        DataError: The file is malformed or contradictory. The message names the line (the header is line 1).
    """
    table = read_text_table(data, origin=origin, kind="reviews")
    header = [name.lower() for name in table.columns]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise DataError(f"{origin} has no column {missing[0]!r}. A table of reviews has the columns {','.join(COLUMNS)}.")
    indices = [header.index(name) for name in COLUMNS]
    reviews = []
    for number, row in table.rows:
        if len(row) < len(header) or any(row[len(header) :]):
            raise DataError(
                f"{origin}, line {number}: expected {len(header)} columns as in the header, got {len(row)}. Download it again."
            )
        reviews.append((number, Review(*(row[index] for index in indices))))
    return _check_reviews(reviews, origin)


def _check_reviews(reviews: Sequence[tuple[int, Review]], origin: str) -> tuple[Review, ...]:
    """Return the reviews with normalized class names. ``reviews`` are preceded by their line numbers. Raises DataError."""
    by_sha256: dict[str, Review] = {}
    checked = []
    for number, original in reviews:
        review = replace(
            original,
            sha256=original.sha256.strip().lower(),
            decision=original.decision.strip().lower(),
            new_label=unicodedata.normalize("NFC", original.new_label),
        )
        if review.decision == NOTE:
            continue
        position = f"{origin}, line {number} ({review.photo})"
        if review.decision not in DECISIONS:
            raise DataError(f"{position}: unknown decision {review.decision!r}. Use {', '.join(DECISIONS)}.")
        if review.decision == LABEL and not review.new_label:
            raise DataError(f"{position}: the decision 'label' requires new_label. Enter a class, or use 'neither'.")
        if len(review.sha256) != 64 or not set(review.sha256) <= set("0123456789abcdef"):
            raise DataError(f"{position}: {review.sha256!r} is not a sha256. Download the table again.")
        other = by_sha256.setdefault(review.sha256, review)
        if (other.decision, other.new_label) != (review.decision, review.new_label):
            raise DataError(f"{position}: contradicts another row of the same photo. Keep one row per photo.")
        checked.append(review)
    return tuple(checked)

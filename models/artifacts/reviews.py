"""Review decisions of people about images, and their CSV format: exported by the gallery, read by training."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields

from models.errors import DataError

LABEL, NEITHER, BAD = "label", "neither", "bad"
DECISIONS = (LABEL, NEITHER, BAD)


@dataclass(frozen=True)
class Review:
    """The current review of one image.

    Attributes:
        sha256: Identifies the image.
        photo: The image's name at the time of the review.
        label: The image's label at the time of the review.
        decision: "label" (the correct label is ``new_label``, possibly unchanged), "neither" (none of the classes) or
            "bad" (unusable).
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
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(astuple(review) for review in reviews)
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def read_reviews(data: bytes, *, origin: str) -> tuple[Review, ...]:
    """Parse a CSV file of reviews. Columns may be in any order, and additional columns are ignored.

    Args:
        data: The bytes of the file.
        origin: The file's name for error messages.

    Raises:
        DataError: The file is malformed or contradictory. The message names the row (the header is row 1).
    """
    try:
        # utf-8-sig: spreadsheets write a byte order mark
        text = data.decode("utf-8-sig", errors="surrogateescape")
        header, *rows = list(csv.reader(io.StringIO(text, newline=""), strict=True)) or [[]]
    except csv.Error as error:
        raise DataError(f"{origin} cannot be read as a table of reviews ({error}). Download it again.") from None
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise DataError(f"{origin} has no column {missing[0]!r}. A table of reviews has the columns {','.join(COLUMNS)}.")
    indices = [header.index(name) for name in COLUMNS]
    reviews = []
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(
                f"{origin}, row {number}: expected {len(header)} columns as in the header, got {len(row)}. Download it again."
            )
        reviews.append(Review(*(row[index] for index in indices)))
    return check_reviews(reviews, origin=origin)


def check_reviews(reviews: Sequence[Review], *, origin: str) -> tuple[Review, ...]:
    """Validate reviews.

    Args:
        reviews: The rows in the order of the file.
        origin: The file's name for error messages.

    Raises:
        DataError: A decision or sha256 is invalid, or two rows contradict each other on the same image.
    """
    by_sha256: dict[str, Review] = {}
    for number, review in enumerate(reviews, start=2):
        position = f"{origin}, row {number} ({review.photo})"
        if review.decision not in DECISIONS:
            raise DataError(f"{position}: unknown decision {review.decision!r}. Use {', '.join(DECISIONS)}.")
        if review.decision == LABEL and not review.new_label:
            raise DataError(f"{position}: the decision 'label' requires new_label. Enter a class, or use 'neither'.")
        if len(review.sha256) != 64 or not set(review.sha256) <= set("0123456789abcdef"):
            raise DataError(f"{position}: {review.sha256!r} is not a sha256. Download the table again.")
        other = by_sha256.setdefault(review.sha256, review)
        if (other.decision, other.new_label) != (review.decision, review.new_label):
            raise DataError(f"{position}: contradicts another row of the same photo. Keep one row per photo.")
    return tuple(reviews)

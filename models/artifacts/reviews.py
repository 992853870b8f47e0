"""What people decided about photos: one row a photo, as a page writes it and a training reads it."""

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
    """The present decision on a photo, which its sha256 names; ``photo`` and ``label`` are what they were when it was made.

    ``decision`` is "label" (it is ``new_label``, which may be what it was), "neither" (none of the classes) or "bad" (no use).
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
    """The table as CSV in UTF-8."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(astuple(review) for review in reviews)
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def read_reviews(data: bytes, *, origin: str) -> tuple[Review, ...]:
    """Read the table; ``origin`` says where it came from. Columns may stand in any order, and there may be others.

    Raises DataError for what is no such table; it names the row (the header is row 1).
    """
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front
        text = data.decode("utf-8-sig", errors="surrogateescape")
        header, *rows = list(csv.reader(io.StringIO(text, newline=""), strict=True)) or [[]]
    except csv.Error as error:
        raise DataError(f"{origin} cannot be read as a table of reviews ({error}); download it again.") from None
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise DataError(f"{origin} has no column {missing[0]!r}; a table of reviews has {','.join(COLUMNS)}.")
    places = [header.index(name) for name in COLUMNS]
    reviews = []
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(
                f"{origin}, row {number} has {len(row)} columns, not {len(header)} as the header; download it again."
            )
        reviews.append(Review(*(row[place] for place in places)))
    return check_reviews(reviews, origin=origin)


def check_reviews(reviews: Sequence[Review], *, origin: str) -> tuple[Review, ...]:
    """Raise DataError for an unknown decision, a name that is no sha256, and a photo with two decisions that differ."""
    decided: dict[str, Review] = {}
    for number, review in enumerate(reviews, start=2):
        place = f"{origin}, row {number} ({review.photo})"
        if review.decision not in DECISIONS:
            raise DataError(f"{place} has the decision {review.decision!r}; {', '.join(DECISIONS)} are known.")
        if review.decision == LABEL and not review.new_label:
            raise DataError(f"{place} has the decision 'label' and no new_label; name the class, or decide 'neither'.")
        if len(review.sha256) != 64 or not set(review.sha256) <= set("0123456789abcdef"):
            raise DataError(f"{place} has the sha256 {review.sha256!r}, which is none; download the table again.")
        other = decided.setdefault(review.sha256, review)
        if (other.decision, other.new_label) != (review.decision, review.new_label):
            raise DataError(f"{place} decides otherwise than another row of the same photo; leave one row for each photo.")
    return tuple(reviews)

"""Apply what people decided about photos to a dataset: by sha256, never by name, and with a word on each photo."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.data.duplicates import find_duplicates
from finetune.data.image_folder import Dataset
from finetune.data.inspection import ImageRecord
from models.artifacts.reviews import BAD, LABEL, NEITHER, Review, read_reviews
from models.errors import DataError, did_you_mean

EXCLUSION_REASONS = {NEITHER: "it is of none of the classes", BAD: "it is a bad photo"}


@dataclass(frozen=True)
class ReviewTable:
    """A table of reviews as it arrived: its bytes, where they came from, and the decision on each sha256."""

    data: bytes
    origin: str
    decisions: dict[str, Review]

    @classmethod
    def parse(cls, data: bytes, *, origin: str) -> ReviewTable:
        return cls(data, origin, {review.sha256: review for review in read_reviews(data, origin=origin)})

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class ReviewSummary:
    """What the reviews did to a dataset. ``relabeled`` maps a photo to its old and new class, ``excluded`` to the reason."""

    reviews: ReviewTable
    relabeled: dict[str, tuple[str, str]] = field(default_factory=dict)
    confirmed: list[str] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    matched: set[str] = field(default_factory=set)

    def as_dict(self) -> dict[str, Any]:
        """The counts, for a manifest: no names of people and no notes."""
        reasons = list(self.excluded.values())
        return {
            "sha256": self.reviews.sha256,
            "decisions": len(self.reviews.decisions),
            "relabeled": len(self.relabeled),
            "confirmed": len(self.confirmed),
            "neither": reasons.count(EXCLUSION_REASONS[NEITHER]),
            "bad": reasons.count(EXCLUSION_REASONS[BAD]),
            "other_copies": len([reason for reason in reasons if reason not in EXCLUSION_REASONS.values()]),
            "unmatched": len(self.reviews.decisions) - len(self.matched),
        }

    def text(self) -> str:
        """What was changed and dropped, photo by photo."""
        counts = self.as_dict()
        lines = [
            f"Reviews from {self.reviews.origin}: {counts['decisions']:,} photos decided; here {len(self.relabeled):,} labels "
            f"changed, {len(self.confirmed):,} confirmed, {len(self.excluded):,} photos left out, and "
            f"{counts['unmatched']:,} rows matched no photo"
        ]
        lines += [f"  {name}: {old} -> {new}" for name, (old, new) in self.relabeled.items()]
        lines += [f"  {name}: left out, as {reason}" for name, reason in self.excluded.items()]
        return "\n".join(lines)


def apply_reviews(
    reviews: ReviewTable, dataset: Dataset, records: Sequence[ImageRecord]
) -> tuple[Dataset, list[ImageRecord], ReviewSummary]:
    """The dataset and its scans with the decisions in place of the folders' labels. Raises DataError for an unknown class.

    A decision counts for every copy of the photo. Where the same photo lay in two classes, it settles that too: a copy that
    looks the same and says otherwise is left out, and so is one whose folder was wrong if it lies in the other split.
    """
    _check_classes(reviews, dataset.classes)
    applied = ReviewSummary(reviews)
    for record in records:
        _note(record, reviews, dataset.classes, applied)
    for group in find_duplicates(records):
        _settle(group, reviews, dataset.classes, applied)
    classes = {name: index for index, name in enumerate(dataset.classes)}
    kept = []
    for record in records:
        sample = record.sample
        if sample.name in applied.relabeled:
            sample = dataclasses.replace(sample, label=classes[applied.relabeled[sample.name][1]])
        if sample.name not in applied.excluded:
            kept.append(dataclasses.replace(record, sample=sample))
    return dataset.with_samples(record.sample for record in kept), kept, applied


def _check_classes(reviews: ReviewTable, classes: Sequence[str]) -> None:
    for review in reviews.decisions.values():
        if review.decision == LABEL and review.new_label not in classes:
            raise DataError(
                f"{reviews.origin} says that {review.photo} is {review.new_label!r}, and the classes are {', '.join(classes)}."
                f"{did_you_mean(review.new_label, classes)} Mend the row, or add the class's folder."
            )


def _note(record: ImageRecord, reviews: ReviewTable, classes: Sequence[str], applied: ReviewSummary) -> None:
    review = reviews.decisions.get(record.sha256)
    if review is None:
        return
    applied.matched.add(record.sha256)
    old = classes[record.sample.label]
    if review.decision != LABEL:
        applied.excluded[record.sample.name] = EXCLUSION_REASONS[review.decision]
    elif review.new_label == old:
        applied.confirmed.append(record.sample.name)
    else:
        applied.relabeled[record.sample.name] = (old, review.new_label)


def _settle(group: Sequence[ImageRecord], reviews: ReviewTable, classes: Sequence[str], applied: ReviewSummary) -> None:
    """Settle photos that look the same and lay in two classes, where the decisions on some of them agree."""
    decisions = [reviews.decisions[s.sha256] for s in group if s.sha256 in reviews.decisions]
    decided = {review.new_label for review in decisions if review.decision == LABEL}
    if len({s.sample.label for s in group}) < 2 or len(decided) != 1:
        return
    label = decided.pop()
    for record in group:
        if record.sha256 not in reviews.decisions and classes[record.sample.label] != label:
            applied.excluded[record.sample.name] = f"it looks the same as a photo that was decided to be {label}"
    left = [s for s in group if s.sample.name not in applied.excluded]
    right = [s for s in left if classes[s.sample.label] == label] or [s for s in left if s.sample.split == "train"]
    if len({s.sample.split for s in left}) > 1:
        for record in left:
            if record not in right:
                _forget(record, applied)
                applied.excluded[record.sample.name] = (
                    f"the same photo, which was decided to be {label}, lies in the other split"
                )


def _forget(record: ImageRecord, applied: ReviewSummary) -> None:
    applied.relabeled.pop(record.sample.name, None)
    if record.sample.name in applied.confirmed:
        applied.confirmed.remove(record.sample.name)

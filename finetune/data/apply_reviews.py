"""Apply review decisions to a dataset: relabel, confirm or exclude images, matched by sha256."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.data.duplicates import find_duplicates
from finetune.data.image_folder import Dataset
from finetune.data.inspection import ImageRecord
from finetune.io.terminal import escape_controls
from models.artifacts.reviews import BAD, LABEL, NEITHER, Review, read_reviews
from models.errors import DataError, did_you_mean, list_names

EXCLUSION_REASONS = {NEITHER: "none of the classes", BAD: "bad photo"}


@dataclass(frozen=True)
class ReviewTable:
    """A table of reviews.

    Attributes:
        data: The CSV file's bytes, as received.
        origin: File name or address, without secrets, for messages.
        decisions: The review of each image, by sha256.
    """

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
    """The effect of reviews on a dataset.

    Attributes:
        reviews: The applied reviews.
        relabeled: Maps an image's name to its old and new class.
        confirmed: Names of the images whose label was confirmed.
        excluded: Maps an image's name to the reason.
        matched: The reviewed sha256s that are in the dataset.
    """

    reviews: ReviewTable
    relabeled: dict[str, tuple[str, str]] = field(default_factory=dict)
    confirmed: list[str] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    matched: set[str] = field(default_factory=set)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts for a manifest, without the reviewers' names and notes."""
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
        """Format a summary line and a line per relabeled or excluded image."""
        counts = self.as_dict()
        lines = [
            f"{self.reviews.origin}: {counts['decisions']:,} reviews ({len(self.relabeled):,} relabeled, "
            f"{len(self.confirmed):,} confirmed, {len(self.excluded):,} excluded, {counts['unmatched']:,} unmatched)"
        ]
        lines += [f"  {name}: {old} -> {new}" for name, (old, new) in self.relabeled.items()]
        lines += [f"  {name}: excluded ({reason})" for name, reason in self.excluded.items()]
        return "\n".join(map(escape_controls, lines))


def apply_reviews(
    reviews: ReviewTable, dataset: Dataset, records: Sequence[ImageRecord]
) -> tuple[Dataset, list[ImageRecord], ReviewSummary]:
    """Apply review decisions on top of the folders' labels.

    A decision applies to every exact copy of an image. It also resolves near duplicates with conflicting labels: images
    that contradict the decision are excluded, as are copies with a corrected label if the other split has the image too.

    Returns:
        The dataset and records with the decisions applied, and a summary.

    Raises:
        DataError: A review has a class that the dataset does not have.
    """
    _check_classes(reviews, dataset.classes)
    summary = ReviewSummary(reviews)
    for record in records:
        _apply_decision(record, reviews, dataset.classes, summary)
    for group in find_duplicates(records):
        _resolve_conflict(group, reviews, dataset.classes, summary)
    classes = {name: index for index, name in enumerate(dataset.classes)}
    remaining = []
    for record in records:
        sample = record.sample
        if sample.name in summary.relabeled:
            sample = dataclasses.replace(sample, label=classes[summary.relabeled[sample.name][1]])
        if sample.name not in summary.excluded:
            remaining.append(dataclasses.replace(record, sample=sample))
    return dataset.with_samples(record.sample for record in remaining), remaining, summary


def _check_classes(reviews: ReviewTable, classes: Sequence[str]) -> None:
    for review in reviews.decisions.values():
        if review.decision == LABEL and review.new_label not in classes:
            raise DataError(
                f"{reviews.origin}: unknown class {review.new_label!r} for {review.photo}. The classes are "
                f"{list_names(classes)}.{did_you_mean(review.new_label, classes)} Fix the row, or add a folder for the class."
            )


def _apply_decision(record: ImageRecord, reviews: ReviewTable, classes: Sequence[str], summary: ReviewSummary) -> None:
    review = reviews.decisions.get(record.sha256)
    if review is None:
        return
    summary.matched.add(record.sha256)
    old = classes[record.sample.label]
    if review.decision != LABEL:
        summary.excluded[record.sample.name] = EXCLUSION_REASONS[review.decision]
    elif review.new_label == old:
        summary.confirmed.append(record.sample.name)
    else:
        summary.relabeled[record.sample.name] = (old, review.new_label)


def _resolve_conflict(
    group: Sequence[ImageRecord], reviews: ReviewTable, classes: Sequence[str], summary: ReviewSummary
) -> None:
    """Resolve a group of duplicates with different labels if the decisions on some of them agree on one class."""
    decisions = [reviews.decisions[s.sha256] for s in group if s.sha256 in reviews.decisions]
    decided = {review.new_label for review in decisions if review.decision == LABEL}
    if len({s.sample.label for s in group}) < 2 or len(decided) != 1:
        return
    label = decided.pop()
    for record in group:
        if record.sha256 not in reviews.decisions and classes[record.sample.label] != label:
            summary.excluded[record.sample.name] = f"near duplicate of a photo reviewed as {label}"
    remaining = [s for s in group if s.sample.name not in summary.excluded]
    preferred = [s for s in remaining if classes[s.sample.label] == label]
    preferred = preferred or [s for s in remaining if s.sample.split == "train"]
    if len({s.sample.split for s in remaining}) > 1:
        for record in remaining:
            if record not in preferred:
                _undo(record, summary)
                summary.excluded[record.sample.name] = f"reviewed as {label}, and the other split has the same photo"


def _undo(record: ImageRecord, summary: ReviewSummary) -> None:
    summary.relabeled.pop(record.sample.name, None)
    if record.sample.name in summary.confirmed:
        summary.confirmed.remove(record.sample.name)

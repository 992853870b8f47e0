"""Photos of further folders that the data folder has already: left out, so that none is in training and validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.data.duplicates import find_duplicates
from finetune.data.image_folder import Dataset
from finetune.data.inspection import ImageRecord


@dataclass(frozen=True)
class ExistingImage:
    """The photo of the data folder for which a further one was left out; ``label`` is its class where that is another."""

    name: str
    label: str | None

    def __str__(self) -> str:
        return f"{self.name}, which is {self.label} there" if self.label else self.name


def drop_known_images(
    dataset: Dataset, records: Sequence[ImageRecord]
) -> tuple[Dataset, list[ImageRecord], dict[str, ExistingImage]]:
    """The dataset and its scans without them, and each one's twin.

    Left out is a photo with the sha256 of one of the data folder, in whatever split and class, and one that looks the same
    as a photo that validation measures with.
    """
    duplicates: dict[str, ExistingImage] = {}
    for group in find_duplicates(records) if any(s.sample.is_extra for s in records) else ():
        own = [s for s in group if not s.sample.is_extra]
        for record in group:
            if record.sample.is_extra and (twin := _twin(record, own, dataset.classes)):
                duplicates[record.sample.name] = twin
    kept = [s for s in records if s.sample.name not in duplicates]
    return dataset.with_samples(s.sample for s in kept), kept, duplicates


def describe_dropped(duplicates: Mapping[str, ExistingImage]) -> str:
    """How many were left out and why."""
    one = len(duplicates) == 1
    many, it = f"{len(duplicates):,} photo{'' if one else 's'}", "it" if one else "them"
    said = f"{many} of --extra-data, left out, as the data folder has {it}"
    others = sum(twin.label is not None for twin in duplicates.values())
    return f"{said}; {others:,} of them in another class, which is for --reviews to change" if others else said


def _twin(record: ImageRecord, own: Sequence[ImageRecord], classes: Sequence[str]) -> ExistingImage | None:
    copies = [s for s in own if s.sha256 == record.sha256] or [s for s in own if s.sample.split == "valid"]
    if not copies:
        return None
    chosen = min(copies, key=lambda s: s.sample.label != record.sample.label)
    return ExistingImage(
        chosen.sample.name, classes[chosen.sample.label] if chosen.sample.label != record.sample.label else None
    )

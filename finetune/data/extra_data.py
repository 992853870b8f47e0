"""Drop images of ``--extra-data`` that the data folder already has, which prevents leakage into validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.data.duplicates import find_duplicates
from finetune.data.image_folder import Dataset
from finetune.data.inspection import ImageRecord


@dataclass(frozen=True)
class ExistingImage:
    """An image of the data folder that duplicates an extra one. ``label`` is its class if the labels differ, else None."""

    name: str
    label: str | None

    def __str__(self) -> str:
        return f"{self.name} (labeled {self.label})" if self.label else self.name


def drop_known_images(
    dataset: Dataset, records: Sequence[ImageRecord]
) -> tuple[Dataset, list[ImageRecord], dict[str, ExistingImage]]:
    """Drop extra images that are exact duplicates of any image of the data folder, or near duplicates of a validation image.

    Returns:
        The remaining dataset and records, and {name of the dropped image: its duplicate in the data folder}.
    """
    duplicates: dict[str, ExistingImage] = {}
    for group in find_duplicates(records) if any(s.sample.is_extra for s in records) else ():
        own = [s for s in group if not s.sample.is_extra]
        for record in group:
            if record.sample.is_extra and (known := _find_existing(record, own, dataset.classes)):
                duplicates[record.sample.name] = known
    remaining = [s for s in records if s.sample.name not in duplicates]
    return dataset.with_samples(s.sample for s in remaining), remaining, duplicates


def describe_dropped(duplicates: Mapping[str, ExistingImage]) -> str:
    """Summarize the dropped images in one line."""
    text = f"skipped {len(duplicates):,} photo{'' if len(duplicates) == 1 else 's'} from --extra-data"
    relabeled = sum(known.label is not None for known in duplicates.values())
    if not relabeled:
        return f"{text} (already in the data folder)"
    return f"{text} (already in the data folder, {relabeled:,} with another label; use --reviews to change labels)"


def _find_existing(record: ImageRecord, own: Sequence[ImageRecord], classes: Sequence[str]) -> ExistingImage | None:
    copies = [s for s in own if s.sha256 == record.sha256] or [s for s in own if s.sample.split == "valid"]
    if not copies:
        return None
    best = min(copies, key=lambda s: s.sample.label != record.sample.label)  # prefer one with the same label
    return ExistingImage(best.sample.name, classes[best.sample.label] if best.sample.label != record.sample.label else None)

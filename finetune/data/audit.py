"""Audit an image folder before training: damaged files, duplicates, leakage between splits, and class problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.duplicates import find_duplicates
from finetune.data.extra_data import ExistingImage, describe_dropped
from finetune.data.image_files import in_ignored_folder, is_ignored_folder, is_image_file
from finetune.data.image_folder import Dataset, read_dataset
from finetune.data.inspection import ImageRecord, fingerprint_context, inspect_images
from finetune.io.array_store import ArrayStore
from models.artifacts.paths import default_cache_dir
from models.errors import DataError

MAX_IMBALANCE = 3.0
MAX_SHOWN = 10


@dataclass(frozen=True)
class AuditReport:
    """The findings of an audit. Images are named by their path relative to the data folder.

    Attributes:
        counts: Readable images as {split: {class: count}}.
        damaged: Maps each undecodable image to the reason.
        other_files: Files in class folders without a supported image extension.
        ignored_folders: Hidden folders and those starting with ``__``.
        empty_classes: Class folders without readable images, as "split/class".
        class_mismatch: Classes that only one of the splits has, as {"training" or "validation": classes}.
        leakage: Groups of duplicates across training and validation.
        conflicts: Groups of duplicates with different labels.
        duplicates: Groups of duplicates within one class and split.
        imbalance: Size of the largest training class divided by that of the smallest.
        split_from_train: Whether validation was held out from training.
        dropped_extra: Maps each skipped image of ``--extra-data`` to its duplicate in the data folder.
    """

    root: str
    counts: dict[str, dict[str, int]]
    damaged: dict[str, str]
    other_files: list[str]
    ignored_folders: list[str]
    empty_classes: list[str]
    class_mismatch: dict[str, list[str]]
    leakage: list[list[str]]
    conflicts: list[list[str]]
    duplicates: list[list[str]]
    imbalance: float
    split_from_train: bool
    dropped_extra: dict[str, ExistingImage] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def problems(self) -> list[str]:
        """One line per kind of problem; empty if there are none."""
        found = []
        if self.class_mismatch:
            only = "; ".join(f"only in {split}: {', '.join(names)}" for split, names in self.class_mismatch.items())
            found.append(f"classes differ between the splits ({only})")
        if self.leakage:
            found.append(f"{_count(self.leakage, 'group')} of duplicates across training and validation (leakage)")
        if self.conflicts:
            found.append(f"{_count(self.conflicts, 'group')} of duplicates with different labels")
        if self.damaged:
            found.append(f"{_count(self.damaged, 'damaged file')} (skipped)")
        if self.dropped_extra:
            found.append(describe_dropped(self.dropped_extra))
        if self.other_files:
            found.append(f"{_count(self.other_files, 'file')} without a supported image extension (skipped)")
        if self.ignored_folders:
            found.append(_count(self.ignored_folders, "ignored folder"))
        if self.empty_classes:
            found.append(f"{_count(self.empty_classes, 'class folder')} without readable photos")
        if self.imbalance > MAX_IMBALANCE:
            found.append(f"the largest class has {self.imbalance:.1f} times as many photos as the smallest")
        return found

    def raise_for_problems(self, *, allow_leakage: bool, allow_class_mismatch: bool) -> None:
        """Check that the dataset can be trained on.

        Args:
            allow_leakage: Accept duplicates across training and validation.
            allow_class_mismatch: Accept classes that are missing or empty in one of the splits.

        Raises:
            DataError: A split has no readable images, or there is a problem that the arguments do not allow.
        """
        for split, row in self.counts.items():
            if not any(row.values()):
                name = "training" if split == "train" else "validation"
                raise DataError(f"{self.root}: no readable photos for {name}. Run `finetune audit {self.root}` for details.")
        if self.class_mismatch and not allow_class_mismatch:
            raise DataError(
                f"{self.root}: {self.problems[0]}. Use the same class folders in every split, or pass --allow-class-mismatch."
            )
        if self.empty_classes and not allow_class_mismatch:
            raise DataError(
                f"{self.root}: {self.empty_classes[0]} has no readable photos. Add photos, delete the folder, or pass "
                f"--allow-class-mismatch."
            )
        if self.leakage and not allow_leakage:
            example = " = ".join(self.leakage[0][:3])
            raise DataError(
                f"{self.root}: {_count(self.leakage, 'photo')} in both training and validation ({example}), which "
                f"inflates the results. Run `finetune audit {self.root}` to list them and delete the duplicates, or "
                f"pass --allow-leakage."
            )

    def text(self) -> str:
        """Format the findings as text, with the first ten file names of each kind."""
        lines = [f"{self.root}: {sum(sum(row.values()) for row in self.counts.values()):,} photos"]
        for split, row in self.counts.items():
            origin = " (held out from training)" if split == "valid" and self.split_from_train else ""
            lines.append(f"  {split}{origin}: " + ", ".join(f"{name} {n:,}" for name, n in row.items()))
        lines += [f"- {problem}" for problem in self.problems] or ["No problems found."]
        if self.duplicates:
            lines.append(f"Note: {_count(self.duplicates, 'group')} of duplicates within the same class and split.")
        lines += _section("Damaged", [f"{name}: {reason}" for name, reason in self.damaged.items()])
        lines += _section(
            "Extra photos already in the data folder", [f"{name} = {known}" for name, known in self.dropped_extra.items()]
        )
        lines += _section("Other files", self.other_files)
        lines += _section("Ignored folders", self.ignored_folders)
        lines += _section("Empty classes", self.empty_classes)
        lines += _section("Duplicates across training and validation", [" = ".join(group) for group in self.leakage])
        lines += _section("Duplicates with different labels", [" = ".join(group) for group in self.conflicts])
        lines += _section("Duplicates within a class and split", [" = ".join(group) for group in self.duplicates])
        return "\n".join(lines)


def audit(
    dataset: Dataset, records: Sequence[ImageRecord], *, dropped_extra: Mapping[str, ExistingImage] | None = None
) -> AuditReport:
    """Audit a dataset.

    Args:
        dataset: The dataset.
        records: Inspection results of its images.
        dropped_extra: Extra images that were dropped from ``dataset``, with their duplicates in it.
    """
    readable = [s.sample for s in records if s.error is None]
    counts = {
        split: {
            name: sum(sample.split == split and sample.label == label for sample in readable)
            for label, name in enumerate(dataset.classes)
        }
        for split in ("train", "valid")
    }
    leakage, conflicts, duplicates = [], [], []
    for group in find_duplicates(records):
        names = [s.sample.name for s in group]
        if len({s.sample.split for s in group}) > 1:
            leakage.append(names)
        if len({s.sample.label for s in group}) > 1:
            conflicts.append(names)
        if len({(s.sample.split, s.sample.label) for s in group}) == 1:
            duplicates.append(names)
    sizes = [n for n in counts["train"].values() if n]
    return AuditReport(
        root=str(dataset.root),
        counts=counts,
        damaged={s.sample.name: s.error for s in records if s.error is not None},
        other_files=_other_files(dataset),
        ignored_folders=_ignored_folders(dataset),
        empty_classes=[f"{split}/{name}" for split, row in counts.items() for name, n in row.items() if not n],
        class_mismatch=_class_mismatch(dataset),
        leakage=leakage,
        conflicts=conflicts,
        duplicates=duplicates,
        imbalance=max(sizes) / min(sizes) if sizes else 1.0,
        split_from_train=dataset.split_from_train,
        dropped_extra=dict(dropped_extra or {}),
    )


def audit_folder(data_dir: Path, *, cache_dir: Path | None = None, workers: int = 0, quiet: bool = False) -> AuditReport:
    """Read, inspect and audit a data folder.

    Args:
        data_dir: The folder.
        cache_dir: Folder of the fingerprint cache. None: the default.
        workers: Number of decoding threads. 0: one per CPU.
        quiet: Hide the progress bar.
    """
    dataset = read_dataset(data_dir)
    store = ArrayStore(cache_dir or default_cache_dir(), fingerprint_context(), limit_mb=4096)
    return audit(dataset, inspect_images(dataset.samples, store=store, workers=workers, quiet=quiet))


def _other_files(dataset: Dataset) -> list[str]:
    return [
        _name(file, dataset)
        for folder in _class_folders(dataset)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not is_image_file(file, folder) and not in_ignored_folder(file, folder)
    ]


def _ignored_folders(dataset: Dataset) -> list[str]:
    top_level = {entry for folder in (dataset.root, *dataset.split_folders.values()) for entry in folder.iterdir()}
    nested = {entry for folder in _class_folders(dataset) for entry in folder.rglob("*")}
    return sorted(_name(entry, dataset) for entry in top_level | nested if entry.is_dir() and is_ignored_folder(entry.name))


def _class_folders(dataset: Dataset) -> list[Path]:
    return [folder / name for split, folder in dataset.split_folders.items() for name in dataset.split_classes[split]]


def _class_mismatch(dataset: Dataset) -> dict[str, list[str]]:
    if "valid" not in dataset.split_folders:
        return {}
    train, valid = (set(dataset.split_classes[split]) for split in ("train", "valid"))
    only = {"training": sorted(train - valid), "validation": sorted(valid - train)}
    return {split: names for split, names in only.items() if names}


def _name(path: Path, dataset: Dataset) -> str:
    return path.relative_to(dataset.root).as_posix()


def _count(items: Iterable[object], noun: str) -> str:
    n = sum(1 for _ in items)
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {len(lines) - MAX_SHOWN:,} more (use --json to list all)"] if len(lines) > MAX_SHOWN else []
    return [f"{title}:", *(f"  {line}" for line in lines[:MAX_SHOWN]), *more]

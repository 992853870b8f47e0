"""What is wrong with a photo folder, by file name, before any training."""

from __future__ import annotations

import argparse
import json
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
    """The findings on a dataset. ``counts`` is {split: {class: photos}}; photos are named from the data folder.

    ``leakage`` are groups that lie in training and validation, ``conflicts`` groups that lie in two classes,
    ``duplicates`` groups within one class and split; ``damaged`` maps a photo to the reason, ``dropped_extra``
    one of a further folder, which was left out, to the data folder's own.
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
        """What should be mended, a sentence each; nothing where all is well."""
        found = []
        if self.class_mismatch:
            only = "; ".join(f"only {split} has {', '.join(names)}" for split, names in self.class_mismatch.items())
            found.append(f"classes differ between the splits: {only}")
        if self.leakage:
            found.append(f"{_count(self.leakage, 'group')} of photos in both training and validation (leakage)")
        if self.conflicts:
            found.append(f"{_count(self.conflicts, 'group')} of the same photo in two classes")
        if self.damaged:
            found.append(f"{_count(self.damaged, 'damaged file')}, left out")
        if self.dropped_extra:
            found.append(describe_dropped(self.dropped_extra))
        if self.other_files:
            found.append(f"{_count(self.other_files, 'file')} of another kind than photos, passed over")
        if self.ignored_folders:
            found.append(f"{_count(self.ignored_folders, 'ignored folder')}, passed over")
        if self.empty_classes:
            found.append(f"{_count(self.empty_classes, 'class folder')} without photos")
        if self.imbalance > MAX_IMBALANCE:
            found.append(f"the largest class has {self.imbalance:.1f} times the photos of the smallest")
        return found

    def raise_for_problems(self, *, allow_leakage: bool, allow_class_mismatch: bool) -> None:
        """Raise DataError where training on this is impossible, or would deceive and that is not allowed."""
        for split, row in self.counts.items():
            if not any(row.values()):
                name = "training" if split == "train" else "validation"
                raise DataError(f"{self.root}: there is no photo for {name} that can be read; `finetune audit` says why.")
        if self.class_mismatch and not allow_class_mismatch:
            raise DataError(
                f"{self.root}: {self.problems[0]}; give every split the same class folders, or go on with "
                f"--allow-class-mismatch."
            )
        if self.empty_classes and not allow_class_mismatch:
            raise DataError(
                f"{self.root}: {self.empty_classes[0]} has no photo that can be read; add photos, delete the folder, or go on "
                f"with --allow-class-mismatch."
            )
        if self.leakage and not allow_leakage:
            example = " = ".join(self.leakage[0][:3])
            raise DataError(
                f"{self.root}: {_count(self.leakage, 'photo')} in both training and validation ({example}), which flatters "
                f"the result; `finetune audit {self.root}` names all, delete one of each, or go on with --allow-leakage."
            )

    def text(self) -> str:
        """The findings for a person, the first ten of each kind by name."""
        lines = [f"{self.root}: {sum(sum(row.values()) for row in self.counts.values()):,} photos"]
        for split, row in self.counts.items():
            held = ", held out from training" if split == "valid" and self.split_from_train else ""
            lines.append(f"  {split}{held}: " + ", ".join(f"{name} {n:,}" for name, n in row.items()))
        lines += [f"- {problem}" for problem in self.problems] or ["- nothing wrong was found"]
        if self.duplicates:
            lines.append(
                f"- no harm, but good to know: {_count(self.duplicates, 'group')} of the same photo within one class and split"
            )
        lines += _section("Damaged", [f"{name}: {why}" for name, why in self.damaged.items()])
        lines += _section(
            "Of --extra-data, and in the data folder", [f"{name} = {twin}" for name, twin in self.dropped_extra.items()]
        )
        lines += _section("Other files", self.other_files)
        lines += _section("Ignored folders", self.ignored_folders)
        lines += _section("Empty classes", self.empty_classes)
        lines += _section("In training and validation", [" = ".join(group) for group in self.leakage])
        lines += _section("In two classes", [" = ".join(group) for group in self.conflicts])
        lines += _section("Repeated", [" = ".join(group) for group in self.duplicates])
        return "\n".join(lines)


def audit(
    dataset: Dataset, records: Sequence[ImageRecord], *, dropped_extra: Mapping[str, ExistingImage] | None = None
) -> AuditReport:
    """Judge a dataset by the records of its photos; ``dropped_extra`` are those of further folders that were left out of it."""
    good = [s.sample for s in records if s.error is None]
    counts = {
        split: {
            name: sum(sample.split == split and sample.label == label for sample in good)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data_dir", type=Path, metavar="DATA", help="the folder to look at")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, all of them")
    parser.add_argument(
        "--cache-dir", type=Path, default=None, help="where what photos look like is kept (default: ~/.cache/finetune)"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads that decode photos")


def run(args: argparse.Namespace) -> int:
    """``finetune audit DATA``: print the findings. The exit code is 0 where nothing is wrong, else 1."""
    dataset = read_dataset(args.data_dir)
    store = ArrayStore(args.cache_dir or default_cache_dir(), fingerprint_context(), limit_mb=4096)
    found = audit(dataset, inspect_images(dataset.samples, store=store, workers=args.workers, quiet=args.json))
    print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) if args.json else found.text())
    return 1 if found.problems else 0


def _other_files(dataset: Dataset) -> list[str]:
    return [
        _name(file, dataset)
        for folder in _class_folders(dataset)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not is_image_file(file, folder) and not in_ignored_folder(file, folder)
    ]


def _ignored_folders(dataset: Dataset) -> list[str]:
    beside = {entry for folder in (dataset.root, *dataset.split_folders.values()) for entry in folder.iterdir()}
    inside = {entry for folder in _class_folders(dataset) for entry in folder.rglob("*")}
    return sorted(_name(entry, dataset) for entry in beside | inside if entry.is_dir() and is_ignored_folder(entry.name))


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
    more = [f"  ... and {len(lines) - MAX_SHOWN:,} more; --json lists all"] if len(lines) > MAX_SHOWN else []
    return [f"{title}:", *(f"  {line}" for line in lines[:MAX_SHOWN]), *more]

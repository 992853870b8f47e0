"""Audit an image folder before training: damaged files, duplicates, leakage between splits, and class problems."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.class_names import find_similar
from finetune.data.duplicates import find_duplicates, move_linked_to_train
from finetune.data.extra_data import ExistingImage, describe_dropped
from finetune.data.image_files import ALREADY_INCLUDED, HARMLESS, Skipped, describe_skipped
from finetune.data.image_folder import NO_LABEL, Dataset, Sample, read_dataset
from finetune.data.inspection import ImageRecord, fingerprint_context, inspect_images
from finetune.io.array_store import ArrayStore
from finetune.io.terminal import escape_controls
from models.artifacts.paths import default_cache_dir
from models.errors import DataError, list_names

MAX_IMBALANCE = 3.0
MAX_SHOWN = 10
MAX_LINE = 100  # characters of class counts


@dataclass(frozen=True)
class AuditReport:
    """The findings of an audit. Images are named by their path relative to the data folder.

    Attributes:
        counts: Readable images as {split: {class: count}}.
        folders: The folder of each split, relative to the data folder.
        damaged: Maps each undecodable image to the reason.
        skipped: Maps each skipped file and folder to the reason.
        unlabeled: Maps each split without class folders to its folder's description.
        empty_classes: Class folders without readable images, as "split/class".
        small_classes: Maps each class that is too small to hold out a photo to its number of different photos.
        class_mismatch: Classes that only one of the splits has, as {"training" or "validation": classes}.
        leakage: Sets of duplicates across training and validation.
        conflicts: Groups of duplicates with different labels. None of the classes counts as a label.
        duplicates: Groups of duplicates within one class and split.
        imbalance: Size of the largest training class divided by that of the smallest.
        split_from_train: Whether validation was held out from training.
        dropped_extra: Maps each skipped image of ``--extra-data`` to its duplicate in the data folder.
        test_split: Name of the test split, which training does not use.
        test_is_labeled: Whether the test split has labels.
        split_groups: Maps each group of the table that is in several splits to its number of images in each.
        table: Path of the table of labels, if there is one.
        has_groups: Whether the table divides the images into groups.
        repeated_rows: Number of rows of the table that repeat another one.
        neither: Number of readable images of none of the classes, by their folder.
        similar_classes: Sets of classes whose names probably mean the same, with the number of images of each.
    """

    root: str
    counts: dict[str, dict[str, int]]
    folders: dict[str, str]
    damaged: dict[str, str]
    skipped: dict[str, str]
    unlabeled: dict[str, str]
    empty_classes: list[str]
    small_classes: dict[str, int]
    class_mismatch: dict[str, list[str]]
    leakage: list[list[str]]
    conflicts: list[list[str]]
    duplicates: list[list[str]]
    imbalance: float
    split_from_train: bool
    dropped_extra: dict[str, ExistingImage] = field(default_factory=dict)
    test_split: str | None = None
    test_is_labeled: bool = True
    split_groups: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    table: str | None = None
    has_groups: bool = False
    repeated_rows: int = 0
    neither: dict[str, int] = field(default_factory=dict)
    similar_classes: list[dict[str, int]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return all findings, with the lines of ``problems`` and why training fails (``refusal``)."""
        return asdict(self) | {"problems": self.problems, "refusal": self.refusal}

    @property
    def _command(self) -> str:
        return f"finetune audit {self.root}" + (f" --labels {self.table}" if self.table else "")

    @property
    def problems(self) -> list[str]:
        """One line per kind of problem; empty if there are none."""
        found = list(self.unlabeled.values())
        if self.class_mismatch:
            found.append(self._describe_mismatch())
        found += map(self._describe_similar, self.similar_classes)
        found += [self._describe_small_class(name, photos) for name, photos in self.small_classes.items()]
        if self.split_groups:
            found.append(f"{_count(self.split_groups, 'group')} of the table in several splits (leakage)")
        if self.leakage:
            found.append(f"{_count(self.leakage, 'group')} of duplicates across training and validation (leakage)")
        if self.conflicts:
            found.append(f"{_count(self.conflicts, 'group')} of duplicates with different labels")
        if self.damaged:
            found.append(f"{_count(self.damaged, 'damaged file')} (skipped)")
        if self.dropped_extra:
            found.append(describe_dropped(self.dropped_extra))
        found += self._describe_skipped(harmless=False)
        if self.empty_classes:
            found.append(f"{_count(self.empty_classes, 'class folder')} without readable photos")
        if self.is_imbalanced:
            found.append(
                f"the largest class has {self.imbalance:.1f} times as many photos as the smallest; to find more photos of the "
                "small ones, at the price of more false alarms, add --class-frequencies equal"
            )
        return found

    @property
    def is_imbalanced(self) -> bool:
        return self.imbalance > MAX_IMBALANCE

    def refusals(self, *, allow_leakage: bool = False, allow_class_mismatch: bool = False) -> list[str]:
        """Return every reason why training on this folder fails, with what to do about it.

        Args:
            allow_leakage: Accept duplicates across training and validation.
            allow_class_mismatch: Accept classes that are missing or empty in one of the splits.
        """
        reasons = [
            f"{description}, so it cannot be used for validation. Sort its photos into class folders, or move the folder "
            f"{split} elsewhere to hold out some training photos."
            for split, description in self.unlabeled.items()
        ]
        if self.class_mismatch and not allow_class_mismatch:
            reasons.append(f"{self._describe_mismatch()}. Use the same classes in every split, or pass --allow-class-mismatch.")
        empty = [split for split, row in self.counts.items() if not any(row.values())]
        for split in empty:
            has_no_class = not allow_class_mismatch and self.class_mismatch.get("training") == list(self.counts["valid"])
            if split == "train" or not (self.unlabeled or has_no_class):
                name = "training" if split == "train" else "validation"
                reasons.append(f"no readable photos for {name}. Run `{self._command}` for details.")
        if not allow_class_mismatch:
            reasons += [
                f"{self._describe_small_class(name, photos)}. Add photos, or remove the class."
                for name, photos in self.small_classes.items()
            ]
            missing = {f"valid/{name}" for name in self.class_mismatch.get("training", ())}
            folders = [name for name in self.empty_classes if name.split("/")[0] not in empty and name not in missing]
            if folders:
                have, these = ("has", "the class") if len(folders) == 1 else ("have", "the classes")
                reasons.append(
                    f"{list_names(folders)} {have} no readable photos. Add photos, remove {these}, or pass "
                    "--allow-class-mismatch."
                )
        if self.split_groups and not allow_leakage:
            reasons.append(
                f"{_count(self.split_groups, 'group')} of the table in several splits "
                f"({_describe_splits(*next(iter(self.split_groups.items())))}), which inflates the results. Run "
                f"`{self._command}` to list them and give all rows of a group the same split, or pass --allow-leakage."
            )
        if self.leakage and not allow_leakage:
            example = " = ".join(self.leakage[0][:3])
            reasons.append(
                f"{_count(self.leakage, 'photo')} in both training and validation ({example}), which inflates the results. Run "
                f"`{self._command}` to list them and delete the duplicates, or pass --allow-leakage."
            )
        return reasons

    @property
    def refusal(self) -> str | None:
        """The error of training on this folder with default settings, or None."""
        return self._error(self.refusals())

    def raise_for_problems(self, *, allow_leakage: bool, allow_class_mismatch: bool) -> None:
        """Raise DataError with all ``refusals``, if there are any."""
        error = self._error(self.refusals(allow_leakage=allow_leakage, allow_class_mismatch=allow_class_mismatch))
        if error:
            raise DataError(error)

    def _error(self, reasons: Sequence[str]) -> str | None:
        if len(reasons) <= 1:
            return f"{self.root}: {reasons[0]}" if reasons else None
        listed = "".join(f"\n  {number}. {reason}" for number, reason in enumerate(reasons, start=1))
        return f"{self.root} cannot be trained on for {len(reasons)} reasons:{listed}"

    def text(self) -> str:
        """Format the findings as text, with the first ten file names of each kind."""
        lines = [f"{self.root}: {sum(sum(row.values()) for row in self.counts.values()):,} photos"]
        lines += self._count_lines()
        lines += [f"- {problem}" for problem in self.problems] or ["No problems found."]
        if self.duplicates:
            lines.append(f"Note: {_count(self.duplicates, 'group')} of duplicates within the same class and split.")
        if self.test_split and self.test_is_labeled:
            lines.append(
                f"Note: {self.test_split} is not used for training. Evaluate it with `finetune evaluate "
                f"--split {shlex.quote(self.test_split)}`."
            )
        elif self.test_split:
            lines.append(
                f"Note: {self.test_split} is not used because it has no class folders. Classify its photos with "
                "`finetune predict`."
            )
        if self.repeated_rows:
            lines.append(f"Note: {_count(range(self.repeated_rows), 'row')} of the table repeated another one.")
        lines += [
            f"Note: {folder} has {_count(range(photos), 'photo')} of none of the classes. They belong to no class and "
            "measure how many such photos the model recognizes."
            for folder, photos in self.neither.items()
        ]
        lines += [f"Note: {line}" for line in self._describe_skipped(harmless=True)]
        lines += _section("Damaged", [f"{name}: {reason}" for name, reason in self.damaged.items()])
        lines += _section(
            "Extra photos already in the data folder", [f"{name} = {known}" for name, known in self.dropped_extra.items()]
        )
        lines += _section("Skipped", [f"{name}: {reason}" for name, reason in self.skipped.items()])
        lines += _section("Empty classes", self.empty_classes)
        lines += _section("Groups in several splits", [_describe_splits(*row) for row in self.split_groups.items()])
        lines += _section("Duplicates across training and validation", [" = ".join(group) for group in self.leakage])
        lines += _section("Duplicates with different labels", [" = ".join(group) for group in self.conflicts])
        lines += _section("Duplicates within a class and split", [" = ".join(group) for group in self.duplicates])
        reasons = self.refusals()
        if len(reasons) == 1:
            lines.append(f"Training on this folder fails: {self.root}: {reasons[0]}")
        elif reasons:
            lines.append(f"Training on this folder fails for {len(reasons)} reasons:")
            lines += [f"  {number}. {reason}" for number, reason in enumerate(reasons, start=1)]
        return "\n".join(map(escape_controls, lines))

    def _describe_skipped(self, *, harmless: bool) -> list[str]:
        entries = [Skipped(Path(name), why) for name, why in self.skipped.items() if (why in HARMLESS) == harmless]
        return describe_skipped(entries)

    def _describe_mismatch(self) -> str:
        only = "; ".join(f"only in {split}: {list_names(names)}" for split, names in self.class_mismatch.items())
        return f"classes differ between the splits ({only})"

    def _describe_similar(self, counts: Mapping[str, int]) -> str:
        (first, photos), *others = sorted(counts.items(), key=lambda row: row[1])
        names = [f"{_count(range(photos), 'photo')} {'is' if photos == 1 else 'are'} labeled {first!r}"]
        names += [f"{photos:,} {name!r}" for name, photos in others]
        fix = "write its label alike in every row" if self.table else "move its photos into one folder"
        return f"{', '.join(names)}; if this is one class, {fix}"

    def _describe_small_class(self, name: str, photos: int) -> str:
        linked = "near duplicates or of one group" if self.has_groups else "near duplicates"
        different = "" if photos == 1 else f", all {linked}"
        return (
            f"the class {name} has {photos:,} readable photo{'' if photos == 1 else 's'}{different}, but at least two "
            f"different ones are needed to hold one out for validation"
        )

    def _count_lines(self) -> list[str]:
        """Format the counts as one line per split, or as a table if that line would be long."""
        origins = {**self.folders, **({"valid": "held out from training"} if self.split_from_train else {})}
        titles = {s: s if origins.get(s, s) == s else f"{s} ({origins[s]})" for s in self.counts}
        rows = {titles[split]: ", ".join(f"{name} {n:,}" for name, n in row.items()) for split, row in self.counts.items()}
        if max(map(len, rows.values())) <= MAX_LINE:
            return [f"  {title}: {row}" for title, row in rows.items()]
        names = list(self.counts["train"])
        width = max(map(len, names))
        table = [f"  {'class':<{width}}  " + "  ".join(titles.values())]
        for name in names:
            cells = (f"{row[name]:>{len(titles[split])},}" for split, row in self.counts.items())
            table.append(f"  {name:<{width}}  " + "  ".join(cells))
        return table


def audit(
    dataset: Dataset,
    records: Sequence[ImageRecord],
    *,
    neither: Sequence[ImageRecord] = (),
    dropped_extra: Mapping[str, ExistingImage] | None = None,
) -> AuditReport:
    """Audit a dataset.

    Args:
        dataset: The dataset.
        records: Inspection results of its images.
        neither: Inspection results of its images of none of the classes.
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
    small_classes = _count_small_classes(readable, dataset)
    leakage, conflicts, duplicates = [], [], []
    inspected = [*records, *neither]
    for group in find_duplicates(inspected):
        names = [s.sample.name for s in group]
        places = {(s.sample.label, s.sample.label != NO_LABEL and s.sample.split) for s in group}
        if len({split for label, split in places if label != NO_LABEL}) > 1:
            leakage.append(names)
        if len({label for label, _ in places}) > 1:
            conflicts.append(names)
        if len(places) == 1:
            duplicates.append(names)
    sizes = [n for n in counts["train"].values() if n]
    return AuditReport(
        root=str(dataset.root),
        counts=counts,
        folders={split: _name(folder, dataset) for split, folder in dataset.split_folders.items() if folder != dataset.root},
        damaged={s.sample.name: s.error for s in inspected if s.error is not None},
        skipped={_name(entry.path, dataset): entry.reason for entry in dataset.skipped},
        unlabeled={
            _name(dataset.split_folders[split], dataset): _describe_unlabeled(dataset, split) for split in dataset.unlabeled
        },
        empty_classes=[
            f"{split}/{name}"
            for split, row in counts.items()
            for name, n in row.items()
            if not n and name not in small_classes and split not in dataset.unlabeled
        ],
        small_classes=small_classes,
        class_mismatch=_class_mismatch(dataset),
        leakage=leakage,
        conflicts=conflicts,
        duplicates=duplicates,
        imbalance=max(sizes) / min(sizes) if sizes else 1.0,
        split_from_train=dataset.split_from_train,
        dropped_extra=dict(dropped_extra or {}),
        test_split=dataset.test_split,
        test_is_labeled=dataset.test_is_labeled,
        split_groups=dataset.split_groups,
        table=str(dataset.labels.path) if dataset.labels else None,
        has_groups=any(sample.group for sample in dataset.samples),
        repeated_rows=dataset.labels.repeated if dataset.labels else 0,
        neither=_count_neither([s.sample for s in neither if s.error is None], dataset),
        similar_classes=_similar_classes(counts, dataset),
    )


def audit_folder(
    data_dir: Path, *, labels: Path | None = None, cache_dir: Path | None = None, workers: int = 0, quiet: bool = False
) -> AuditReport:
    """Read, inspect and audit a data folder.

    Args:
        data_dir: The folder.
        labels: Table of the labels.
        cache_dir: Folder of the fingerprint cache. None: the default.
        workers: Number of decoding threads. 0: one per CPU.
        quiet: Hide the progress bar.
    """
    dataset = read_dataset(data_dir, labels=labels)
    store = ArrayStore(cache_dir or default_cache_dir(), fingerprint_context(), limit_mb=4096)
    records = inspect_images([*dataset.samples, *dataset.neither], store=store, workers=workers, quiet=quiet)
    records, neither = records[: len(dataset.samples)], records[len(dataset.samples) :]
    return audit(*move_linked_to_train(dataset, records), neither=neither)


def _count_small_classes(readable: Sequence[Sample], dataset: Dataset) -> dict[str, int]:
    """Count the photos of each class that is too small to be split into training and validation photos."""
    if not dataset.split_from_train:
        return {}
    splits = {name: [s.split for s in readable if s.label == label] for label, name in enumerate(dataset.classes)}
    return {name: len(own) for name, own in splits.items() if own and len(set(own)) < 2}


def _describe_splits(group: str, counts: Mapping[str, int]) -> str:
    return f"{group}: " + ", ".join(f"{count:,} in {split}" for split, count in counts.items())


def _describe_unlabeled(dataset: Dataset, split: str) -> str:
    photos, folder = dataset.unlabeled[split], dataset.split_folders[split]
    if any(entry.reason == ALREADY_INCLUDED and entry.path.is_relative_to(folder) for entry in dataset.skipped):
        return f"{_name(folder, dataset)} only links to folders that are included already"
    own = f" and {photos:,} photo{'' if photos == 1 else 's'} of its own" if photos else ""
    return f"{_name(folder, dataset)} has no class folders{own}"


def _similar_classes(counts: Mapping[str, Mapping[str, int]], dataset: Dataset) -> list[dict[str, int]]:
    return [{name: sum(row[name] for row in counts.values()) for name in names} for names in find_similar(dataset.classes)]


def _count_neither(samples: Sequence[Sample], dataset: Dataset) -> dict[str, int]:
    """Count photos of none of the classes in each folder next to the classes of a split, or in the table."""
    if dataset.labels and samples:
        return {dataset.labels.path.name: len(samples)}
    return dict(Counter(_name(sample.path.parent, dataset) for sample in samples))


def _class_mismatch(dataset: Dataset) -> dict[str, list[str]]:
    if "valid" not in dataset.split_folders or "valid" in dataset.unlabeled:
        return {}
    train, valid = (set(dataset.split_classes[split]) for split in ("train", "valid"))
    only = {"training": sorted(train - valid), "validation": sorted(valid - train)}
    return {split: names for split, names in only.items() if names}


def _name(path: Path, dataset: Dataset) -> str:
    return path.relative_to(dataset.root).as_posix() if path.is_relative_to(dataset.root) else str(path)


def _count(items: Iterable[object], noun: str) -> str:
    n = sum(1 for _ in items)
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {len(lines) - MAX_SHOWN:,} more (use --json to list all)"] if len(lines) > MAX_SHOWN else []
    return [f"{title}:", *(f"  {line}" for line in lines[:MAX_SHOWN]), *more]

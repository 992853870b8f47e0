"""Read labeled images from ``SPLIT/CLASS/`` folders, or from a folder of images and a table of their labels."""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.data.folder_layout import (
    LOOSE,
    Layout,
    class_folders,
    find_layout,
    labels_in_names,
    note_unused,
)
from finetune.data.image_files import (
    ALREADY_INCLUDED,
    NEITHER_EXTRA,
    RESULTS,
    ImageSearch,
    Skipped,
    describe_skipped,
    unreadable,
)
from finetune.data.label_table import SPLIT, LabelRow, LabelTable, is_table, read_label_table
from models.artifacts.data_folder import EXTENSIONS, TEST, TRAIN, VALID, class_name, is_neither, split_of
from models.errors import DataError, list_names

ALL = "all"  # the split of an evaluation of a table without splits
NO_LABEL = -1
_NEITHER_IS_NO_CLASS = "The name none or neither stands for photos of none of the classes."


@dataclass(frozen=True)
class Sample:
    """One labeled image file.

    Attributes:
        name: POSIX path relative to the data folder; for an extra image prefixed with "extra-N/".
        path: Path of the file.
        label: Index into the dataset's classes; NO_LABEL for an image of none of them.
        split: "train", "valid" or the name of another split.
        is_extra: Whether the image comes from ``--extra-data``.
        group: Images of one group stay in one split and one fold; empty for an image of its own.
        facets: The image's values of the other columns of a table.
    """

    name: str
    path: Path
    label: int
    split: str
    is_extra: bool = False
    group: str = ""
    facets: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Dataset:
    """The labeled images of a data folder.

    Attributes:
        root: The data folder.
        classes: Class names, in the order of the labels.
        samples: The images.
        split_folders: The folder of each split that has one.
        split_classes: The classes of each split that has a folder.
        split_from_train: Whether there was no validation folder, so that validation was held out from training.
        unlabeled: Number of photos of each split that has a folder without class folders.
        skipped: Files and folders that were not read.
        test_split: Name of the test split, if it is not used for validation.
        test_is_labeled: Whether the test split has labels.
        labels: The table of the labels, if there is one.
        split_groups: Maps each group that is in several splits to its number of images in each.
        neither: The images of none of the classes, in the training and the validation split. They are not among ``samples``:
            nothing is learned from them, so those of both splits measure how many the model recognizes.
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    split_folders: dict[str, Path]
    split_classes: dict[str, tuple[str, ...]]
    split_from_train: bool = False
    unlabeled: dict[str, int] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    test_split: str | None = None
    test_is_labeled: bool = True
    labels: LabelTable | None = None
    split_groups: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    neither: tuple[Sample, ...] = ()

    def in_split(self, split: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.split == split]

    def with_samples(self, samples: Iterable[Sample]) -> Dataset:
        return replace(self, samples=tuple(samples))


def read_dataset(
    root: Path, *, labels: Path | None = None, valid_fraction: float = 0.2, seed: int = 0, extra: Iterable[Path] = ()
) -> Dataset:
    """List the labeled images of a data folder, sorted by class and name.

    Args:
        root: Folder with ``train/CLASS/`` and ``valid/CLASS/`` (or test, or another usual name), or with ``CLASS/`` only.
        labels: Table of the labels. If set, ``root`` is the folder that its paths are relative to, in any layout.
        valid_fraction: Fraction of each class to hold out if there is no validation split. Groups stay together.
        seed: Seed of the hold-out.
        extra: Further folders or tables whose training images are added as "extra-1/..." and so on. None of them is held out.

    Raises:
        DataError: A folder is missing, there are fewer than two classes, there are no images, or the table is invalid.
    """
    search = ImageSearch()
    dataset = _read_table(root, labels) if labels else _read_folders(root, search)
    extra_samples = [
        sample
        for number, source in enumerate(extra, start=1)
        for sample in read_extra(source, dataset.classes, prefix=f"extra-{number}", search=search)
    ]
    if "valid" not in dataset.split_folders:
        dataset = _hold_out(dataset, valid_fraction, seed, not_groups={s.group for s in extra_samples if s.group})
    samples = (*dataset.samples, *extra_samples)
    return replace(dataset, samples=samples, skipped=tuple(search.skipped), split_groups=_find_split_groups(samples, dataset))


def _read_folders(root: Path, search: ImageSearch, *, min_classes: int = 2) -> Dataset:
    layout = find_layout(root, search)
    if layout.splits and TRAIN not in layout.splits:
        other = next(iter(layout.splits.values())).name
        raise DataError(
            f"{layout.base} has a folder {other} but no folder train. Rename the folder of the training photos to train."
        )
    note_unused(layout, root, search)
    split_folders = {"train": layout.train} | ({"valid": layout.valid} if layout.valid else {})
    images = _find_labeled(split_folders, search)
    classes = tuple(sorted(images["train"].by_class))
    if len(classes) < min_classes:
        raise _too_few_classes(layout, images["train"], search)
    samples = [sample for split, found in images.items() for sample in _samples(root, found, split, classes)]
    if not any(sample.split == "train" for sample in samples):
        raise DataError(
            f"No photos in the class folders of {split_folders['train']}. Supported extensions: {', '.join(EXTENSIONS)}."
            + _explain(search.skipped, root)
        )
    test = layout.splits[TEST] if {TEST, VALID} <= layout.splits.keys() else None
    return Dataset(
        root,
        classes,
        tuple(samples),
        split_folders,
        {split: tuple(sorted(found.by_class)) for split, found in images.items()},
        unlabeled={split: len(found.loose) for split, found in images.items() if not found.by_class},
        test_split=test.relative_to(root).as_posix() if test else None,
        test_is_labeled=test is None or _has_folders(test, search),
        neither=tuple(sample for split, found in images.items() for sample in _neither_samples(root, found, split)),
    )


def _read_table(root: Path, path: Path) -> Dataset:
    table = read_label_table(path, root)
    used = {TRAIN: "train", None: "train"} | {VALID if VALID in table.splits else TEST: "valid"}
    rows: dict[str, list[LabelRow]] = {"train": [], "valid": []}
    for row in table.rows:
        if row.split in used:
            rows[used[row.split]].append(row)
    classes_of = {
        split: tuple(sorted({row.label for row in own if not is_neither(row.label)})) for split, own in rows.items() if own
    }
    classes = classes_of.get("train", ())
    if not classes:
        raise DataError(f"{path} has no rows of the split train. Add some, or remove the column {SPLIT!r}.")
    if len(classes) < 2:
        others = f"{_NEITHER_IS_NO_CLASS} " if any(is_neither(row.label) for row in rows["train"]) else ""
        raise DataError(f"{path} has only one class for training ({classes[0]}). {others}At least two are needed.")
    return Dataset(
        root,
        classes,
        tuple(sample for split in classes_of for sample in _table_samples(root, rows[split], split, classes)),
        dict.fromkeys(classes_of, root),
        classes_of,
        test_split=TEST if {TEST, VALID} <= table.splits else None,
        neither=tuple(sample for split in classes_of for sample in _table_neither(root, rows[split], split, classes)),
        labels=table,
    )


def list_files(root: Path, *, labels: Path | None = None) -> dict[str, Any]:
    """List the photos of a data folder without reading them, and without holding any out for validation.

    Args:
        root: The data folder.
        labels: Table of the labels, if there is one.

    Returns:
        ``splits`` has the paths relative to ``root`` as {split: {class: paths}}, where the split of a folder without splits
        is "all". ``neither`` has the photos of none of the classes. ``skipped`` has what was not read, with the reason.

    Raises:
        DataError: As ``read_dataset``, but one class is enough.
    """
    search = ImageSearch()
    dataset = _read_table(root, labels) if labels else _read_folders(root, search, min_classes=1)
    samples = list(dataset.samples)
    if dataset.test_split and dataset.test_is_labeled:
        samples += read_split(root, dataset.test_split, dataset.classes, labels=labels).samples
    splits: dict[str, dict[str, list[str]]] = {}
    for sample in samples:
        split = {dataset.test_split: TEST}.get(sample.split, sample.split) if "valid" in dataset.split_folders else ALL
        splits.setdefault(split, {}).setdefault(dataset.classes[sample.label], []).append(sample.name)
    return {
        "splits": splits,
        "neither": [sample.name for sample in dataset.neither],
        "skipped": {os.path.relpath(entry.path, root): entry.reason for entry in search.skipped},
    }


def read_extra(source: Path, classes: Sequence[str], *, prefix: str, search: ImageSearch) -> list[Sample]:
    """List the training images of one source of ``--extra-data``.

    Args:
        source: Folder with ``train/CLASS/``, or with ``CLASS/`` only, or a table with paths relative to its folder.
        classes: The classes of the data folder.
        prefix: First component of the samples' names.
        search: Records what is skipped.

    Raises:
        DataError: The source is missing, has no images, or has a class that is not in ``classes``.
    """
    if is_table(source) and not source.is_dir():
        table = read_label_table(source, source.parent)
        rows = [row for row in table.rows if row.split in (TRAIN, None)]
        place, names, root = source, {row.label for row in rows if not is_neither(row.label)}, source.parent
        samples = _table_samples(root, rows, "train", classes)
        neither = _table_neither(root, rows, "train", classes)
    else:
        if not source.is_dir():
            raise DataError(f"No such folder: {source}. --extra-data expects folders with photos in train/CLASS/, or tables.")
        place, root = find_layout(source, search).train, source
        found = _find_labeled({"train": place}, search)["train"]
        names, samples = set(found.by_class), _samples(root, found, "train", classes)
        neither = _neither_samples(root, found, "train")
    for sample in neither:
        search.skip(sample.path, NEITHER_EXTRA)
    unknown = sorted(names - set(classes))
    if unknown:
        raise DataError(
            f"{place} has the class {unknown[0]!r}, but the data folder has {list_names(classes)}. Rename or remove it."
        )
    if not samples:
        raise DataError(f"{place} has no photos of {list_names(classes)}. Remove it from --extra-data.")
    return [replace(sample, name=f"{prefix}/{sample.name}", is_extra=True) for sample in samples]


@dataclass(frozen=True)
class EvaluationSplit:
    """The images of one split: of the classes, and of none of them. ``skipped`` is what was not read."""

    samples: list[Sample]
    neither: list[Sample]
    skipped: list[Skipped]


def read_split(root: Path, split: str | None, classes: Sequence[str], *, labels: Path | None = None) -> EvaluationSplit:
    """List the images of one split for an evaluation.

    Args:
        root: The data folder.
        split: Name of the split's folder, or of a split in the table. Other usual names of it match as well. None: valid, or
            all images of a table without a column ``split``.
        classes: The bundle's classes, in the order of its labels.
        labels: Table of the labels, with paths relative to ``root``.

    Raises:
        DataError: The folder is missing, has no images, or has a class that is not in ``classes``.
    """
    normalized = [class_name(name) for name in classes]
    if labels:
        return _read_table_split(root, labels, split, normalized)
    split = split or VALID
    if not root.is_dir():
        raise DataError(f"No such folder: {root}. Expected a folder with photos in {split}/CLASS/.")
    search = ImageSearch()
    layout = find_layout(root, search)
    folder = _split_folder(layout, root, split)
    if folder is None:
        names = [path.name for path in layout.splits.values()]
        hint = f"one of its folders ({', '.join(names)})" if names else "one of its folders, or to . if it has no splits"
        raise DataError(f"{root} has no folder for the split {split!r}. Set --split to {hint}.")
    found = _find_labeled({split: folder}, search, classes=normalized)[split]
    _require_known(found.by_class, classes, folder)
    samples = _samples(root, found, split, normalized)
    if not samples:
        loose = f"{found.loose_text} and " if found.loose else ""
        raise DataError(
            f"{folder} has {loose}no photos in folders named {list_names(classes)}. Use a folder with photos of them."
            + _explain([entry for entry in search.skipped if entry.reason != LOOSE], root)
        )
    return EvaluationSplit(samples, _neither_samples(root, found, split), search.skipped)


def _read_table_split(root: Path, path: Path, split: str | None, classes: Sequence[str]) -> EvaluationSplit:
    table = read_label_table(path, root)
    known = sorted(name for name in table.splits if name)
    kind = split_of(split) if split else VALID
    if kind not in known and kind == VALID:
        kind = TEST  # as in training
    if split and not known:
        raise DataError(f"{path} has no column {SPLIT!r}. Remove --split to evaluate all of its images.")
    if known and kind not in known:
        raise DataError(f"{path} has no rows of the split {split or VALID!r}. Set --split to one of {', '.join(known)}.")
    rows = [row for row in table.rows if row.split in (kind, None)]
    name = split or (VALID if known else ALL)
    neither = _table_neither(root, rows, name, classes)
    _require_known({row.label for row in rows if not is_neither(row.label)}, classes, path)
    samples = _table_samples(root, rows, name, classes)
    if not samples:
        raise DataError(f"{path} has no photos of {', '.join(classes)} in the split {name!r}. Set --split to another one.")
    return EvaluationSplit(samples, neither, [])


def _require_known(names: Iterable[str], classes: Sequence[str], place: Path) -> None:
    unknown = sorted(set(names) - {class_name(name) for name in classes})
    if unknown:
        raise DataError(
            f"{place} has the class {unknown[0]!r}, but the bundle's classes are {list_names(classes)}. Use photos of the "
            f"bundle's classes, or a bundle for these classes."
        )


def move_to_train(dataset: Dataset, names: Iterable[str]) -> Dataset:
    """Move the held-out images ``names`` back to training."""
    moved = set(names)
    return dataset.with_samples(replace(s, split="train") if s.name in moved else s for s in dataset.samples)


@dataclass(frozen=True)
class _LabeledImages:
    """The images of a split: in class folders, by class, of none of the classes, and outside of folders."""

    folder: Path
    by_class: dict[str, list[Path]]
    loose: list[Path]
    neither: list[Path]

    @property
    def loose_text(self) -> str:
        return f"{len(self.loose):,} photo{'' if len(self.loose) == 1 else 's'} of its own"


def _find_labeled(splits: dict[str, Path], search: ImageSearch, *, classes: Sequence[str] = ()) -> dict[str, _LabeledImages]:
    """Find the images of several splits. A folder that is reached twice, by links, counts where it really is.

    Args:
        splits: The folder of each split.
        search: Records what is skipped.
        classes: Classes that are known already. One of them may have the name of a folder for images of none of the classes.
    """
    found = {split: class_folders(folder, search) for split, folder in splits.items()}
    paths: dict[Path, list[Path]] = defaultdict(list)
    owner = {folder: folder for _, folders in found.values() for folder in folders}
    for image in search.walk(owner):
        paths[next(parent for parent in image.parents if parent in owner)].append(image)
    duplicated = {entry.path for entry in search.skipped if entry.reason == ALREADY_INCLUDED}
    results = {parent for entry in search.skipped if entry.reason == RESULTS for parent in entry.path.parents}
    labeled = {}
    for split, (folder, folders) in found.items():
        by_class: dict[str, list[Path]] = defaultdict(list)
        neither = [other for other in folders if is_neither(other.name) and class_name(other.name) not in classes]
        for class_folder in folders:
            if class_folder in neither:
                continue
            if class_folder not in duplicated and (paths[class_folder] or class_folder not in results):
                by_class[class_name(class_folder.name)] += paths[class_folder]
        loose = search.images(folder)
        for photo in loose:
            search.skip(photo, LOOSE)
        labeled[split] = _LabeledImages(folder, dict(by_class), loose, [path for other in neither for path in paths[other]])
    return labeled


def _has_folders(folder: Path, search: ImageSearch) -> bool:
    try:
        return bool(ImageSearch().folders(folder))
    except OSError as error:  # the reason is reported, and nothing is known of its content
        search.skip(folder, unreadable(error))
        return True


def _samples(root: Path, images: _LabeledImages, split: str, classes: Sequence[str]) -> list[Sample]:
    """Return the samples of ``classes``, sorted by class, folder and name. The audit reports other classes."""
    return [
        Sample(path.relative_to(root).as_posix(), path, classes.index(name), split)
        for name, paths in sorted(images.by_class.items())
        if name in classes
        for path in sorted(paths, key=lambda path: (str(path.parent), path.name))
    ]


def _table_samples(root: Path, rows: Iterable[LabelRow], split: str, classes: Sequence[str]) -> list[Sample]:
    """Return the samples of ``classes`` in a table. The audit reports other classes."""
    indices = {name: index for index, name in enumerate(classes)}
    return [
        Sample(row.image, root / row.image, indices[row.label], split, group=row.group, facets=row.facets)
        for row in rows
        if row.label in indices
    ]


def _table_neither(root: Path, rows: Iterable[LabelRow], split: str, classes: Sequence[str]) -> list[Sample]:
    """Return the samples of none of the classes in a table."""
    return [
        Sample(row.image, root / row.image, NO_LABEL, split, group=row.group, facets=row.facets)
        for row in rows
        if is_neither(row.label) and row.label not in classes
    ]


def _find_split_groups(samples: Iterable[Sample], dataset: Dataset) -> dict[str, dict[str, int]]:
    """Count the images per split of each group that is in several splits."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        counts[sample.group][sample.split] += 1
    if dataset.labels and dataset.test_split:
        for row in dataset.labels.rows:
            counts[row.group][TEST] += row.split == TEST
    return {group: dict(+splits) for group, splits in sorted(counts.items()) if group and len(+splits) > 1}


def _neither_samples(root: Path, images: _LabeledImages, split: str) -> list[Sample]:
    return [Sample(path.relative_to(root).as_posix(), path, NO_LABEL, split) for path in sorted(images.neither)]


def _split_folder(layout: Layout, root: Path, split: str) -> Path | None:
    for parent in (layout.base, root):
        if (parent / split).is_dir():
            return parent / split
    kind = split_of(split)
    if kind == VALID:
        return layout.valid
    if kind is not None:
        return layout.splits.get(kind)
    names = {class_name(folder.name).casefold(): folder for folder in layout.unused}
    return names.get(class_name(split).casefold())


def _too_few_classes(layout: Layout, images: _LabeledImages, search: ImageSearch) -> DataError:
    folder, loose = images.folder, images.loose
    if labels := labels_in_names(loose) if not images.by_class else []:
        examples = [next(photo.name for photo in loose if photo.stem.startswith(label)) for label in labels[:2]]
        return DataError(
            f"{folder} has no class folders, but {len(loose):,} photos named like {examples[0]} and {examples[1]}. Move the "
            f"photos of each class into a folder of its own ({folder.name}/{labels[0]}, {folder.name}/{labels[1]}). To unpack "
            f"the archive of Kaggle's Dogs vs. Cats so, use `finetune download kaggle OUT --archive FILE`."
        )
    found = f"only one class ({next(iter(images.by_class))})" if images.by_class else "no class folders"
    photos = f" and {images.loose_text}" if loose else ""
    others = [path.name for path in layout.unused if layout.splits]
    hint = f" {_NEITHER_IS_NO_CLASS}" if images.neither else ""
    hint += f" Move the folders {', '.join(others[:3])} into {folder} if they are classes." if others else ""
    explained = [entry for entry in search.skipped if entry.path.parent == folder and entry.reason != LOOSE]
    return DataError(
        f"Found {found}{photos} in {folder}. At least two are needed, one folder per class.{hint}" + _explain(explained, folder)
    )


def _explain(skipped: Sequence[Skipped], root: Path) -> str:
    return "".join(f" {line}." for line in describe_skipped(skipped, root))


def _hold_out(dataset: Dataset, fraction: float, seed: int, *, not_groups: Collection[str]) -> Dataset:
    """Assign a fraction of each class to validation: at least one image, but never all. ``not_groups`` stay in training."""
    if any(sample.group for sample in dataset.samples):
        held_out = _select_groups(dataset, fraction, seed, not_groups)
    else:
        held_out = set()
        for label, class_ in enumerate(dataset.classes):
            names = [sample.name for sample in dataset.samples if sample.label == label]
            random.Random(f"{seed}/{class_}").shuffle(names)
            held_out.update(names[: _hold_out_size(len(names), fraction)])
    samples = tuple(replace(s, split="valid") if s.name in held_out else s for s in dataset.samples)
    return replace(dataset, samples=samples, split_from_train=True)


def _hold_out_size(images: int, fraction: float) -> int:
    return min(max(1, round(images * fraction)), images - 1)


def _select_groups(dataset: Dataset, fraction: float, seed: int, not_groups: Collection[str]) -> set[str]:
    """Select complete groups until about ``fraction`` of each class is held out. Returns the names of their images.

    Groups are taken in random order if they bring the classes closer to that fraction. A class that has none then gets its
    smallest group. No class loses its last training image; a class in one group is not held out.
    """
    members: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in dataset.samples:
        members[sample.group, "" if sample.group else sample.name].append(sample)
    counts = {
        key: Counter(sample.label for sample in own) for key, own in members.items() if key[0] not in not_groups or key[1]
    }
    totals = Counter(sample.label for sample in dataset.samples)
    targets = {label: max(1, _hold_out_size(images, fraction)) for label, images in totals.items()}
    held: Counter[int] = Counter()
    selected: list[tuple[str, str]] = []

    def distance(label: int, images: int) -> float:
        return abs(images - targets[label]) / targets[label]

    def take(key: tuple[str, str]) -> None:
        held.update(counts[key])
        selected.append(key)

    def leaves_training(key: tuple[str, str]) -> bool:
        return all(held[label] + images < totals[label] for label, images in counts[key].items())

    order = sorted(counts)
    random.Random(f"{seed}/groups").shuffle(order)
    for key in order:
        gain = sum(distance(label, held[label]) - distance(label, held[label] + n) for label, n in counts[key].items())
        if gain > 0 and leaves_training(key):
            take(key)
    for label in sorted(totals):
        candidates = [key for key in order if counts[key][label] and leaves_training(key)]
        if not held[label] and candidates:
            take(min(candidates, key=lambda key: counts[key].total()))
    return {sample.name for key in selected for sample in members[key]}

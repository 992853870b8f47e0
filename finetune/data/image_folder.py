"""Read labeled images from ``SPLIT/CLASS/`` folders."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.data.image_files import ALREADY_INCLUDED, EXTENSIONS, RESULTS, ImageSearch, Skipped, describe_skipped
from finetune.data.layout import (
    LOOSE,
    TEST,
    TRAIN,
    VALID,
    Layout,
    class_folders,
    class_name,
    find_layout,
    labels_in_names,
    note_unused,
    split_of,
)
from models.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One labeled image file.

    Attributes:
        name: POSIX path relative to the data folder; for an extra image prefixed with "extra-N/".
        path: Path of the file.
        label: Index into the dataset's classes.
        split: "train", "valid" or the name of another split.
        is_extra: Whether the image comes from ``--extra-data``.
    """

    name: str
    path: Path
    label: int
    split: str
    is_extra: bool = False


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
        test_folder: The test split, if it is not used for validation.
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    split_folders: dict[str, Path]
    split_classes: dict[str, tuple[str, ...]]
    split_from_train: bool = False
    unlabeled: dict[str, int] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    test_folder: Path | None = None

    def in_split(self, split: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.split == split]

    def with_samples(self, samples: Iterable[Sample]) -> Dataset:
        return replace(self, samples=tuple(samples))


def read_dataset(root: Path, *, valid_fraction: float = 0.2, seed: int = 0, extra: Iterable[Path] = ()) -> Dataset:
    """List the labeled images of a data folder, sorted by name.

    Args:
        root: Folder with ``train/CLASS/`` and ``valid/CLASS/`` (or test, or another usual name), or with ``CLASS/`` only.
        valid_fraction: Fraction of each class to hold out if there is no validation folder.
        seed: Seed of the hold-out.
        extra: Further folders whose training images are added as "extra-1/..." and so on. None of them is held out.

    Raises:
        DataError: A folder is missing, there are fewer than two classes, or there are no images.
    """
    layout = find_layout(root)
    if layout.splits and TRAIN not in layout.splits:
        other = next(iter(layout.splits.values())).name
        raise DataError(
            f"{layout.base} has a folder {other} but no folder train. Rename the folder of the training photos to train."
        )
    search = ImageSearch()
    note_unused(layout, root, search)
    split_folders = {"train": layout.train} | ({"valid": layout.valid} if layout.valid else {})
    images = _find_labeled(split_folders, search)
    classes = tuple(sorted(images["train"].by_class))
    if len(classes) < 2:
        raise _too_few_classes(layout, images["train"], search)
    samples = [sample for split, found in images.items() for sample in _samples(root, found, split, classes)]
    if not any(sample.split == "train" for sample in samples):
        raise DataError(
            f"No photos in the class folders of {split_folders['train']}. Supported extensions: {', '.join(EXTENSIONS)}."
            + _explain(search.skipped, root)
        )
    dataset = Dataset(
        root,
        classes,
        tuple(samples),
        split_folders,
        {split: tuple(sorted(found.by_class)) for split, found in images.items()},
        unlabeled={split: len(found.loose) for split, found in images.items() if not found.by_class},
        test_folder=layout.splits.get(TEST) if VALID in layout.splits else None,
    )
    dataset = dataset if layout.valid else _hold_out(dataset, valid_fraction, seed)
    extra_samples = [
        read_extra_folder(folder, classes, prefix=f"extra-{number}", search=search)
        for number, folder in enumerate(extra, start=1)
    ]
    samples = list(itertools.chain(dataset.samples, *extra_samples))
    return replace(dataset, samples=tuple(samples), skipped=tuple(search.skipped))


def read_extra_folder(folder: Path, classes: Sequence[str], *, prefix: str, search: ImageSearch) -> list[Sample]:
    """List the training images of a folder of ``--extra-data``.

    Args:
        folder: Folder with ``train/CLASS/``, or with ``CLASS/`` only.
        classes: The classes of the data folder.
        prefix: First component of the samples' names.
        search: Records what is skipped.

    Raises:
        DataError: The folder is missing, has no images, or has a class that is not in ``classes``.
    """
    if not folder.is_dir():
        raise DataError(f"No such folder: {folder}. --extra-data expects folders with photos in train/CLASS/.")
    train = find_layout(folder).train
    found = _find_labeled({"train": train}, search)["train"]
    unknown = sorted(found.by_class.keys() - set(classes))
    if unknown:
        raise DataError(
            f"{train} has the class {unknown[0]!r}, but the data folder has {', '.join(classes)}. Rename or remove it."
        )
    samples = _samples(folder, found, "train", classes)
    if not samples:
        raise DataError(f"{train} has no photos in folders named {', '.join(classes)}. Remove it from --extra-data.")
    return [replace(sample, name=f"{prefix}/{sample.name}", is_extra=True) for sample in samples]


def read_split(root: Path, split: str, classes: Sequence[str]) -> tuple[list[Sample], list[Skipped]]:
    """List the images of one split for an evaluation.

    Args:
        root: The data folder.
        split: Name of the split's folder. Other usual names of the folder match as well.
        classes: The bundle's classes, in the order of its labels.

    Returns:
        The images, and what was skipped.

    Raises:
        DataError: The folder is missing, has no images, or has a class that is not in ``classes``.
    """
    if not root.is_dir():
        raise DataError(f"No such folder: {root}. Expected a folder with photos in {split}/CLASS/.")
    layout = find_layout(root)
    folder = _split_folder(layout, root, split)
    if folder is None:
        names = [path.name for path in layout.splits.values()]
        hint = f"one of its folders ({', '.join(names)})" if names else "one of its folders, or to . if it has no splits"
        raise DataError(f"{root} has no folder for the split {split!r}. Set --split to {hint}.")
    search = ImageSearch()
    found = _find_labeled({split: folder}, search)[split]
    normalized = [class_name(name) for name in classes]
    unknown = sorted(found.by_class.keys() - set(normalized))
    if unknown:
        raise DataError(
            f"{folder} has the class {unknown[0]!r}, but the bundle's classes are {', '.join(classes)}. Use photos of the "
            f"bundle's classes, or a bundle for these classes."
        )
    samples = _samples(root, found, split, normalized)
    if not samples:
        loose = f"{found.loose_text} and " if found.loose else ""
        raise DataError(
            f"{folder} has {loose}no photos in folders named {', '.join(classes)}. Use a folder with photos of them."
            + _explain([entry for entry in search.skipped if entry.reason != LOOSE], root)
        )
    return samples, search.skipped


def move_to_train(dataset: Dataset, names: Iterable[str]) -> Dataset:
    """Move the held-out images ``names`` back to training."""
    moved = set(names)
    return dataset.with_samples(replace(s, split="train") if s.name in moved else s for s in dataset.samples)


@dataclass(frozen=True)
class _LabeledImages:
    """The images of a split: in class folders, by class, and outside of them."""

    folder: Path
    by_class: dict[str, list[Path]]
    loose: list[Path]

    @property
    def loose_text(self) -> str:
        return f"{len(self.loose):,} photo{'' if len(self.loose) == 1 else 's'} of its own"


def _find_labeled(splits: dict[str, Path], search: ImageSearch) -> dict[str, _LabeledImages]:
    """Find the images of several splits. A folder that is reached twice, by links, counts where it really is."""
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
        for class_folder in folders:
            if class_folder not in duplicated and (paths[class_folder] or class_folder not in results):
                by_class[class_name(class_folder.name)] += paths[class_folder]
        loose = search.images(folder)
        for photo in loose:
            search.skip(photo, LOOSE)
        labeled[split] = _LabeledImages(folder, dict(by_class), loose)
    return labeled


def _samples(root: Path, images: _LabeledImages, split: str, classes: Sequence[str]) -> list[Sample]:
    """Return the samples of ``classes``, sorted by class, folder and name. The audit reports other classes."""
    return [
        Sample(path.relative_to(root).as_posix(), path, classes.index(name), split)
        for name, paths in sorted(images.by_class.items())
        if name in classes
        for path in sorted(paths, key=lambda path: (str(path.parent), path.name))
    ]


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
    hint = f" Move the folders {', '.join(others[:3])} into {folder} if they are classes." if others else ""
    explained = [entry for entry in search.skipped if entry.path.parent == folder and entry.reason != LOOSE]
    return DataError(
        f"Found {found}{photos} in {folder}. At least two are needed, one folder per class.{hint}" + _explain(explained, folder)
    )


def _explain(skipped: Sequence[Skipped], root: Path) -> str:
    return "".join(f" {line}." for line in describe_skipped(skipped, root))


def _hold_out(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Assign a fraction of each class to validation: at least one image, but never all."""
    held_out: set[str] = set()
    for label in range(len(dataset.classes)):
        names = [sample.name for sample in dataset.samples if sample.label == label]
        random.Random(f"{seed}/{dataset.classes[label]}").shuffle(names)
        held_out.update(names[: min(max(1, round(len(names) * fraction)), len(names) - 1)])
    samples = tuple(replace(s, split="valid") if s.name in held_out else s for s in dataset.samples)
    return replace(dataset, samples=samples, split_from_train=True)

"""Read labeled images from ``SPLIT/CLASS/`` folders, based on torchvision's ImageFolder."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from finetune.data.image_files import EXTENSIONS, is_ignored_folder, is_image_file
from models.errors import DataError
from models.preprocess import decode

TRAIN_FOLDERS = ("train", "training")
VALID_FOLDERS = ("valid", "val", "validation", "test")


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
        split_classes: The class folders of each split that has a folder.
        split_from_train: Whether there was no validation folder, so that validation was held out from training.
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    split_folders: dict[str, Path]
    split_classes: dict[str, tuple[str, ...]]
    split_from_train: bool = False

    def in_split(self, split: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.split == split]

    def with_samples(self, samples: Iterable[Sample]) -> Dataset:
        return replace(self, samples=tuple(samples))


class UprightImageFolder(ImageFolder):
    """An ImageFolder that applies EXIF orientation, converts to RGB and ignores hidden folders."""

    def __init__(self, root: Path) -> None:
        super().__init__(
            str(root), loader=load_image, is_valid_file=lambda path: is_image_file(Path(path), root), allow_empty=True
        )

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = list_classes(Path(directory))
        return names, {name: index for index, name in enumerate(names)}


def load_image(path: str | Path) -> Image.Image:
    """Read a file as an RGB image with EXIF orientation applied. Raises ImageError."""
    return decode(Path(path).read_bytes())


def list_classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_ignored_folder(entry.name))


def read_dataset(root: Path, *, valid_fraction: float = 0.2, seed: int = 0, extra: Iterable[Path] = ()) -> Dataset:
    """List the labeled images of a data folder, sorted by name.

    Args:
        root: Folder with ``train/CLASS/`` and ``valid/CLASS/`` (or val, validation, test), or with ``CLASS/`` only.
        valid_fraction: Fraction of each class to hold out if there is no validation folder.
        seed: Seed of the hold-out.
        extra: Further folders whose training images are added as "extra-1/..." and so on. None of them is held out.

    Raises:
        DataError: A folder is missing, there are fewer than two classes, or there are no images.
    """
    if not root.is_dir():
        raise DataError(f"No such folder: {root}. Expected a folder with photos in train/CLASS/ and valid/CLASS/.")
    train = _first_folder(root, TRAIN_FOLDERS)
    valid = _first_folder(root, VALID_FOLDERS)
    if train is None and valid is not None:
        raise DataError(
            f"{root} has a folder {valid.name} but no folder train. Rename the folder of the training photos to train."
        )
    split_folders = {"train": train or root} | ({"valid": valid} if valid else {})
    split_classes = {split: tuple(list_classes(folder)) for split, folder in split_folders.items()}
    classes = split_classes["train"]
    if len(classes) < 2:
        found = f"only one class ({classes[0]})" if classes else "no class folders"
        raise DataError(f"Found {found} in {split_folders['train']}. At least two are needed, one folder per class.")
    samples = [sample for split in split_folders for sample in _list(root, split_folders[split], split, classes)]
    if not any(sample.split == "train" for sample in samples):
        raise DataError(
            f"No photos in the class folders of {split_folders['train']}. Supported extensions: {', '.join(EXTENSIONS)}."
        )
    dataset = Dataset(root, classes, tuple(samples), split_folders, split_classes)
    dataset = dataset if valid else _hold_out(dataset, valid_fraction, seed)
    extra_samples = [
        read_extra_folder(folder, classes, prefix=f"extra-{number}") for number, folder in enumerate(extra, start=1)
    ]
    return dataset.with_samples(itertools.chain(dataset.samples, *extra_samples))


def read_extra_folder(folder: Path, classes: Sequence[str], *, prefix: str) -> list[Sample]:
    """List the training images of a folder of ``--extra-data``.

    Args:
        folder: Folder with ``train/CLASS/``, or with ``CLASS/`` only.
        classes: The classes of the data folder.
        prefix: First component of the samples' names.

    Raises:
        DataError: The folder is missing, has no images, or has a class that is not in ``classes``.
    """
    if not folder.is_dir():
        raise DataError(f"No such folder: {folder}. --extra-data expects folders with photos in train/CLASS/.")
    train = _first_folder(folder, TRAIN_FOLDERS) or folder
    unknown = sorted(set(list_classes(train)) - set(classes))
    if unknown:
        raise DataError(
            f"{train} has the class {unknown[0]!r}, but the data folder has {', '.join(classes)}. Rename or remove it."
        )
    samples = _list(folder, train, "train", classes)
    if not samples:
        raise DataError(f"{train} has no photos in folders named {', '.join(classes)}. Remove it from --extra-data.")
    return [replace(sample, name=f"{prefix}/{sample.name}", is_extra=True) for sample in samples]


def read_split(root: Path, split: str, classes: Sequence[str]) -> list[Sample]:
    """List the images of one split for an evaluation.

    Args:
        root: The data folder.
        split: Name of the split's folder. "train" and "valid" also match the other usual names of these folders.
        classes: The bundle's classes, in the order of its labels.

    Raises:
        DataError: The folder is missing, has no images, or has a class that is not in ``classes``.
    """
    if not root.is_dir():
        raise DataError(f"No such folder: {root}. Expected a folder with photos in {split}/CLASS/.")
    folder = _first_folder(root, VALID_FOLDERS if split == "valid" else TRAIN_FOLDERS if split == "train" else (split,))
    if folder is None:
        raise DataError(f"{root} has no folder for the split {split!r}. Set --split to one of its folders.")
    unknown = sorted(set(list_classes(folder)) - set(classes))
    if unknown:
        raise DataError(
            f"{folder} has the class {unknown[0]!r}, but the bundle's classes are {', '.join(classes)}. Use photos of the "
            f"bundle's classes, or a bundle for these classes."
        )
    samples = _list(root, folder, split, classes)
    if not samples:
        raise DataError(f"{folder} has no photos in folders named {', '.join(classes)}. Use a folder with photos of them.")
    return samples


def move_to_train(dataset: Dataset, names: Iterable[str]) -> Dataset:
    """Move the held-out images ``names`` back to training."""
    moved = set(names)
    return dataset.with_samples(replace(s, split="train") if s.name in moved else s for s in dataset.samples)


def _list(root: Path, folder: Path, split: str, classes: Sequence[str]) -> list[Sample]:
    if not list_classes(folder):
        return []
    image_folder = UprightImageFolder(folder)
    samples = []
    for path, index in image_folder.samples:
        name = image_folder.classes[index]
        if name in classes:  # the audit reports classes that only one split has
            samples.append(Sample(Path(path).relative_to(root).as_posix(), Path(path), classes.index(name), split))
    return samples


def _first_folder(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _hold_out(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Assign a fraction of each class to validation: at least one image, but never all."""
    held_out: set[str] = set()
    for label in range(len(dataset.classes)):
        names = [sample.name for sample in dataset.samples if sample.label == label]
        random.Random(f"{seed}/{dataset.classes[label]}").shuffle(names)
        held_out.update(names[: min(max(1, round(len(names) * fraction)), len(names) - 1)])
    samples = tuple(replace(s, split="valid") if s.name in held_out else s for s in dataset.samples)
    return replace(dataset, samples=samples, split_from_train=True)

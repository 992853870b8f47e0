"""A folder of labelled photos as torchvision's ImageFolder sees it: which photos there are, of which class and split."""

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
    """One labelled file. ``name`` is its POSIX path from the data folder; ``label`` indexes the dataset's classes.

    ``is_extra`` says that it is of a further folder, whose number its name begins with.
    """

    name: str
    path: Path
    label: int
    split: str
    is_extra: bool = False


@dataclass(frozen=True)
class Dataset:
    """The photos of a data folder. ``split_folders`` is {split: folder}; ``split_from_train``: it had no valid folder."""

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
    """ImageFolder whose photos come upright and in RGB, and that takes hidden folders for what they are: not classes."""

    def __init__(self, root: Path) -> None:
        super().__init__(
            str(root), loader=load_image, is_valid_file=lambda path: is_image_file(Path(path), root), allow_empty=True
        )

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = list_classes(Path(directory))
        return names, {name: index for index, name in enumerate(names)}


def load_image(path: str | Path) -> Image.Image:
    """Read a file as an upright RGB picture. Raises ImageError."""
    return decode(Path(path).read_bytes())


def list_classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_ignored_folder(entry.name))


def read_dataset(root: Path, *, valid_fraction: float = 0.2, seed: int = 0, extra: Iterable[Path] = ()) -> Dataset:
    """List the photos below ``root``, in the order of their names.

    ``root`` holds a training folder and one for validation; without the latter a part of each class is held out, and
    without the former the classes lie in ``root`` itself. The training photos of ``extra`` folders are added, named
    "extra-1/..." and so on; none of them is held out. Raises DataError where that gives no photos or one class.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; give one that holds train/CLASS/ and valid/CLASS/ with photos in them.")
    train = _first_folder(root, TRAIN_FOLDERS)
    valid = _first_folder(root, VALID_FOLDERS)
    if train is None and valid is not None:
        raise DataError(f"{root} has a folder {valid.name} and none named train; name the training photos' folder train.")
    split_folders = {"train": train or root} | ({"valid": valid} if valid else {})
    split_classes = {split: tuple(list_classes(folder)) for split, folder in split_folders.items()}
    classes = split_classes["train"]
    if len(classes) < 2:
        found = f"one class ({classes[0]})" if classes else "no class folders"
        raise DataError(
            f"{split_folders['train']} has {found}, and two or more are wanted: one folder a class, with its photos in it."
        )
    samples = [sample for split in split_folders for sample in _list(root, split_folders[split], split, classes)]
    if not any(sample.split == "train" for sample in samples):
        raise DataError(f"{split_folders['train']} has no photos in its class folders; {', '.join(EXTENSIONS[:6])} are read.")
    dataset = Dataset(root, classes, tuple(samples), split_folders, split_classes)
    dataset = dataset if valid else _hold_out(dataset, valid_fraction, seed)
    added = [read_extra_folder(folder, classes, prefix=f"extra-{number}") for number, folder in enumerate(extra, start=1)]
    return dataset.with_samples(itertools.chain(dataset.samples, *added))


def read_extra_folder(folder: Path, classes: Sequence[str], *, prefix: str) -> list[Sample]:
    """The training photos of a further folder: CLASS/ in its folder train, or in itself where it has none.

    Their names begin with ``prefix``. Raises DataError, also where it has a class that is not among ``classes``.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; give one that holds train/CLASS/ with photos in it to --extra-data.")
    train = _first_folder(folder, TRAIN_FOLDERS) or folder
    unknown = sorted(set(list_classes(train)) - set(classes))
    if unknown:
        raise DataError(f"{train} has the class {unknown[0]!r}, and the data's are {', '.join(classes)}; rename or remove it.")
    samples = _list(folder, train, "train", classes)
    if not samples:
        raise DataError(f"{train} has no photos in folders named {', '.join(classes)}; leave it out of --extra-data.")
    return [replace(sample, name=f"{prefix}/{sample.name}", is_extra=True) for sample in samples]


def read_split(root: Path, split: str, classes: Sequence[str]) -> list[Sample]:
    """The photos of one split for an evaluation, with labels of a bundle's ``classes``.

    ``split`` is a folder's name, or "valid" for whichever name validation goes by. Raises DataError, also where the
    folder's classes are not the bundle's.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; give one that holds {split}/CLASS/ with photos in it.")
    folder = _first_folder(root, VALID_FOLDERS if split == "valid" else TRAIN_FOLDERS if split == "train" else (split,))
    if folder is None:
        raise DataError(f"{root} has no folder for the split {split!r}; name one of its folders with --split.")
    unknown = sorted(set(list_classes(folder)) - set(classes))
    if unknown:
        raise DataError(
            f"{folder} has the class {unknown[0]!r}, and the bundle knows {', '.join(classes)}; give photos of the bundle's "
            f"classes, or a bundle for these."
        )
    samples = _list(root, folder, split, classes)
    if not samples:
        raise DataError(f"{folder} has no photos in folders named {', '.join(classes)}; give a folder that does.")
    return samples


def move_to_train(dataset: Dataset, names: Iterable[str]) -> Dataset:
    """Put held-out photos back into training."""
    back = set(names)
    return dataset.with_samples(replace(p, split="train") if p.name in back else p for p in dataset.samples)


def _list(root: Path, folder: Path, split: str, classes: Sequence[str]) -> list[Sample]:
    if not list_classes(folder):
        return []
    found = UprightImageFolder(folder)
    samples = []
    for path, index in found.samples:
        name = found.classes[index]
        if name in classes:  # a class that only one split has is reported by the audit
            samples.append(Sample(Path(path).relative_to(root).as_posix(), Path(path), classes.index(name), split))
    return samples


def _first_folder(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _hold_out(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Mark a part of each class as validation, at least one photo and never all."""
    held: set[str] = set()
    for label in range(len(dataset.classes)):
        names = [sample.name for sample in dataset.samples if sample.label == label]
        random.Random(f"{seed}/{dataset.classes[label]}").shuffle(names)
        held.update(names[: min(max(1, round(len(names) * fraction)), len(names) - 1)])
    samples = tuple(replace(p, split="valid") if p.name in held else p for p in dataset.samples)
    return replace(dataset, samples=samples, split_from_train=True)

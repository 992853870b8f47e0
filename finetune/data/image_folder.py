"""A folder of labelled photos as torchvision's ImageFolder sees it: which photos there are, of which class and split."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from finetune.data.image_files import EXTENSIONS, is_photo, is_stray
from models.errors import DataError
from models.preprocess import decode

TRAIN_FOLDERS = ("train", "training")
VALID_FOLDERS = ("valid", "val", "validation", "test")


@dataclass(frozen=True)
class Photo:
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
    """The photos of a data folder. ``folders`` is {split: folder}; ``split_from_train`` says that there was no valid folder."""

    root: Path
    classes: tuple[str, ...]
    photos: tuple[Photo, ...]
    folders: dict[str, Path]
    split_classes: dict[str, tuple[str, ...]]
    split_from_train: bool = False

    def of(self, split: str) -> list[Photo]:
        return [photo for photo in self.photos if photo.split == split]

    def keep(self, photos: Iterable[Photo]) -> Dataset:
        return replace(self, photos=tuple(photos))


class PhotoFolder(ImageFolder):
    """ImageFolder whose photos come upright and in RGB, and that takes hidden folders for what they are: not classes."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root), loader=open_photo, is_valid_file=lambda path: is_photo(Path(path), root), allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = class_folders(Path(directory))
        return names, {name: index for index, name in enumerate(names)}


def open_photo(path: str | Path) -> Image.Image:
    """Read a file as an upright RGB picture. Raises ImageError."""
    return decode(Path(path).read_bytes())


def class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_stray(entry.name))


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
    folders = {"train": train or root} | ({"valid": valid} if valid else {})
    split_classes = {split: tuple(class_folders(folder)) for split, folder in folders.items()}
    classes = split_classes["train"]
    if len(classes) < 2:
        found = f"one class ({classes[0]})" if classes else "no class folders"
        raise DataError(
            f"{folders['train']} has {found}, and two or more are wanted: one folder a class, with its photos in it."
        )
    photos = [photo for split in folders for photo in _list(root, folders[split], split, classes)]
    if not any(photo.split == "train" for photo in photos):
        raise DataError(f"{folders['train']} has no photos in its class folders; {', '.join(EXTENSIONS[:6])} are read.")
    dataset = Dataset(root, classes, tuple(photos), folders, split_classes)
    dataset = dataset if valid else _hold_out(dataset, valid_fraction, seed)
    added = [read_extra(folder, classes, prefix=f"extra-{number}") for number, folder in enumerate(extra, start=1)]
    return dataset.keep(itertools.chain(dataset.photos, *added))


def read_extra(folder: Path, classes: Sequence[str], *, prefix: str) -> list[Photo]:
    """The training photos of a further folder: CLASS/ in its folder train, or in itself where it has none.

    Their names begin with ``prefix``. Raises DataError, also where it has a class that is not among ``classes``.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; give one that holds train/CLASS/ with photos in it to --extra-data.")
    train = _first_folder(folder, TRAIN_FOLDERS) or folder
    unknown = sorted(set(class_folders(train)) - set(classes))
    if unknown:
        raise DataError(f"{train} has the class {unknown[0]!r}, and the data's are {', '.join(classes)}; rename or remove it.")
    photos = _list(folder, train, "train", classes)
    if not photos:
        raise DataError(f"{train} has no photos in folders named {', '.join(classes)}; leave it out of --extra-data.")
    return [replace(photo, name=f"{prefix}/{photo.name}", is_extra=True) for photo in photos]


def read_split(root: Path, split: str, classes: Sequence[str]) -> list[Photo]:
    """The photos of one split for an evaluation, with labels of a bundle's ``classes``.

    ``split`` is a folder's name, or "valid" for whichever name validation goes by. Raises DataError, also where the
    folder's classes are not the bundle's.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; give one that holds {split}/CLASS/ with photos in it.")
    folder = _first_folder(root, VALID_FOLDERS if split == "valid" else TRAIN_FOLDERS if split == "train" else (split,))
    if folder is None:
        raise DataError(f"{root} has no folder for the split {split!r}; name one of its folders with --split.")
    unknown = sorted(set(class_folders(folder)) - set(classes))
    if unknown:
        raise DataError(
            f"{folder} has the class {unknown[0]!r}, and the bundle knows {', '.join(classes)}; give photos of the bundle's "
            f"classes, or a bundle for these."
        )
    photos = _list(root, folder, split, classes)
    if not photos:
        raise DataError(f"{folder} has no photos in folders named {', '.join(classes)}; give a folder that does.")
    return photos


def move_to_train(dataset: Dataset, names: Iterable[str]) -> Dataset:
    """Put held-out photos back into training."""
    back = set(names)
    return dataset.keep(replace(p, split="train") if p.name in back else p for p in dataset.photos)


def _list(root: Path, folder: Path, split: str, classes: Sequence[str]) -> list[Photo]:
    if not class_folders(folder):
        return []
    found = PhotoFolder(folder)
    photos = []
    for path, index in found.samples:
        name = found.classes[index]
        if name in classes:  # a class that only one split has is reported by the audit
            photos.append(Photo(Path(path).relative_to(root).as_posix(), Path(path), classes.index(name), split))
    return photos


def _first_folder(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _hold_out(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Mark a part of each class as validation, at least one photo and never all."""
    held: set[str] = set()
    for label in range(len(dataset.classes)):
        names = [photo.name for photo in dataset.photos if photo.label == label]
        random.Random(f"{seed}/{dataset.classes[label]}").shuffle(names)
        held.update(names[: min(max(1, round(len(names) * fraction)), len(names) - 1)])
    photos = tuple(replace(p, split="valid") if p.name in held else p for p in dataset.photos)
    return replace(dataset, photos=photos, split_from_train=True)

"""Read a dataset from the files it was published in: the four idx files of MNIST, or class folders with a test split.

The format of idx files is described in https://github.com/cvdfoundation/mnist. No checksum is required, because files may be
another copy of the dataset; the sha256 of each file is recorded instead.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.artifacts.atomic_io import sha256_of
from models.artifacts.data_folder import EXTENSIONS
from models.errors import DataError

TRAIN, TEST = "train", "test"
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
UINT8_MAGIC = bytes((0, 0, 8))
ImageArray = NDArray[np.uint8]
Labels = NDArray[np.int64]


class Split(Protocol):
    """A split of a published dataset, with ``labels`` (N,)."""

    @property
    def labels(self) -> Labels: ...
    def digests(self) -> list[bytes]:
        """Return a hash of each image, which is the same for equal images."""

    def save(self, index: int, folder: Path) -> None:
        """Write an image to ``folder``, named by its index."""


@dataclass(frozen=True)
class ArraySplit:
    """A split of arrays: uint8 ``images`` (N, H, W) grayscale or (N, H, W, 3) RGB, and ``labels`` (N,). Saved as PNG."""

    images: ImageArray
    labels: Labels

    def digests(self) -> list[bytes]:
        return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in self.images]

    def save(self, index: int, folder: Path) -> None:
        Image.fromarray(self.images[index]).save(folder / f"{index:05d}.png", compress_level=1)


@dataclass(frozen=True)
class FileSplit:
    """A split of image files, which are copied unchanged, and ``labels`` (N,)."""

    files: Sequence[Path]
    labels: Labels

    def digests(self) -> list[bytes]:
        return [bytes.fromhex(sha256_of(file)) for file in self.files]

    def save(self, index: int, folder: Path) -> None:
        shutil.copyfile(self.files[index], folder / f"{index:05d}{self.files[index].suffix.lower()}")


@dataclass(frozen=True)
class Published:
    """A dataset as published.

    Attributes:
        train: The training split.
        test: The test split.
        origin: The folder or the package that it was read from.
        sha256s: The sha256 of each file, or of each split's list of files.
    """

    train: Split
    test: Split
    origin: str
    sha256s: dict[str, str]


def has_idx_files(folder: Path) -> bool:
    """Return whether ``folder`` contains all four idx files, compressed or not."""
    return all(_idx_file(folder, name) for name in IDX_FILES)


def has_class_folders(folder: Path) -> bool:
    """Return whether ``folder`` contains ``train`` and ``test`` but no other folder, such as one for validation."""
    return folder.is_dir() and {path.name for path in folder.iterdir() if path.is_dir()} == {TRAIN, TEST}


def read_idx_files(folder: Path, classes: Sequence[str]) -> Published:
    """Read the four idx files of a folder. Raises DataError if one is damaged or they do not fit together."""
    files = {name: file for name in IDX_FILES if (file := _idx_file(folder, name))}
    train_images, train_labels, test_images, test_labels = (_read_idx(files[name]) for name in IDX_FILES)
    for name, images, labels in ((TRAIN, train_images, train_labels), (TEST, test_images, test_labels)):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"The idx files of the {name} split in {folder} have the shapes {images.shape} and {labels.shape}. Expected N "
                "grayscale images and N labels. Use the files as published."
            )
        if labels.max(initial=0) >= len(classes):
            raise DataError(
                f"A label in {folder} is {labels.max()}, but the dataset has {len(classes)} classes. Use its own files."
            )
    return Published(
        train=ArraySplit(train_images, train_labels.astype(np.int64)),
        test=ArraySplit(test_images, test_labels.astype(np.int64)),
        origin=str(folder),
        sha256s={file.name: sha256_of(file) for file in files.values()},
    )


def read_class_folders(folder: Path, classes: Sequence[str]) -> Published:
    """List the images in ``train/CLASS`` and ``test/CLASS``. Raises DataError if a class has no images."""
    train, test = (_list_split(folder / name, classes) for name in (TRAIN, TEST))
    sha256s = {}
    for name, split in ((TRAIN, train), (TEST, test)):
        rows = zip(split.digests(), split.files, strict=True)
        listing = "".join(f"{digest.hex()}  {file.relative_to(folder).as_posix()}\n" for digest, file in rows)
        sha256s[name] = hashlib.sha256(listing.encode()).hexdigest()
    return Published(train, test, str(folder), sha256s)


def _list_split(folder: Path, classes: Sequence[str]) -> FileSplit:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _image_files(folder / name)
        if not found:
            raise DataError(
                f"{folder / name} has no images. Expected images of each class ({', '.join(classes)}) in {folder.name}."
            )
        files += found
        labels += [label] * len(found)
    return FileSplit(files, np.array(labels, dtype=np.int64))


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))


def _idx_file(folder: Path, name: str) -> Path | None:
    """Return the file of this name, compressed or not. Some copies have a dot in place of the second hyphen."""
    names = (name, name.replace("-idx", ".idx"))
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in (".gz", ""))
    return next((file for file in candidates if file.is_file()), None)


def _read_idx(file: Path) -> ImageArray:
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} could not be read ({error}). Replace it with another copy.") from None
    if len(data) < 4 or data[:3] != UINT8_MAGIC:
        raise DataError(f"{file} is not an idx file of bytes. Replace it with another copy.")
    header = 4 + 4 * data[3]
    shape = tuple(int(size) for size in np.frombuffer(data[4:header], dtype=">u4"))
    if len(shape) != data[3] or len(data) != header + math.prod(shape):
        raise DataError(f"{file} is truncated or damaged. Replace it with another copy.")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
